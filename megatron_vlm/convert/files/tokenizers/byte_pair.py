"""tokenizer.json as it came, with the tokens of the model and with BOS as `prompt_rules` writes it."""

import json
from typing import Any

from megatron_vlm.convert.files.prompt_rules import normalizer
from megatron_vlm.data.text.tokenizer import Tokenizer
from megatron_vlm.data.text.tokenizers.byte_pair import Tokenizer as BytePairTokenizer
from megatron_vlm.data.text.tokenizers.byte_pair import without_prefix

_FLAGS = ("single_word", "lstrip", "rstrip")


def found_in_text(tokenizer: Tokenizer) -> dict[int, dict[str, bool]]:
    """Return the added tokens that are not special."""
    added = _read(tokenizer)["added_tokens"]
    return {entry["id"]: {flag: bool(entry.get(flag)) for flag in _FLAGS} for entry in added}


def tokenizer_json(tokenizer: Tokenizer, tokens: list[dict[str, Any]], image: str) -> dict[str, Any]:
    """Return the file.

    Args:
        tokenizer: of this kind.
        tokens: all added tokens, with their flags.
        image: text of the placeholder.
    """
    tree = _read(tokenizer)
    # The library numbers added tokens anew unless the model has them.
    tree["model"]["vocab"] |= {entry["content"]: entry["id"] for entry in tokens}
    has_word_begin = tokenizer.encode("a") != tokenizer.encode("a", continuation=True)
    texts = [entry["content"] for entry in tokens]
    rules = normalizer(bos=tokenizer.bos, image=image, added=texts, word_begin=has_word_begin)
    if has_word_begin:
        changed = without_prefix(tree)
        tree |= {name: changed[name] for name in ("normalizer", "pre_tokenizer")}
    own = tree.get("normalizer")
    rules += own["normalizers"] if own and own["type"] == "Sequence" else [own] if own else []
    return {**tree, "added_tokens": tokens, "normalizer": {"type": "Sequence", "normalizers": rules} if rules else None}


def _read(tokenizer: Tokenizer) -> dict[str, Any]:
    assert isinstance(tokenizer, BytePairTokenizer)
    return json.loads(tokenizer.plain_json)
