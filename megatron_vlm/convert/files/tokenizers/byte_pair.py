"""tokenizer.json as it came, with the tokens of the model and with BOS as `prompt_rules` writes it."""

import json
from collections.abc import Mapping
from typing import Any

from megatron_vlm.config import CheckpointError
from megatron_vlm.convert.files.prompt_rules import normalizer
from megatron_vlm.data.text.tokenizer import Tokenizer
from megatron_vlm.data.text.tokenizers.byte_pair import Tokenizer as BytePairTokenizer
from megatron_vlm.data.text.tokenizers.byte_pair import without_prefix

_FLAGS = ("single_word", "lstrip", "rstrip")
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = {
    ((("Split", _LLAMA_3), ("ByteLevel", False)), True): "llama-bpe",
    ((("Digits", True), ("ByteLevel", True)), False): "smollm",
    ((("ByteLevel", True),), False): "gpt-2",
}
"""llama.cpp's names, by the rules for splitting text and by whether a whole word in the vocabulary needs no merges."""
# Values of llama.cpp's `llama_token_type`.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


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


def ggml_vocabulary(tokenizer: Tokenizer, placeholders: Mapping[int, str]) -> dict[str, Any]:
    """Return pieces, types and merges, and llama.cpp's name of the rules for splitting text.

    Raises:
        CheckpointError: llama.cpp does not know these rules.
    """
    tree = _read(tokenizer)
    added = {entry["id"] for entry in tree["added_tokens"]}
    ids = range(tokenizer.vocab_size + len(placeholders))

    def type_of(token: int) -> int:
        if token in placeholders:
            return _CONTROL
        if tokenizer.is_control(token):
            return _UNUSED if tokenizer.piece_id(tokenizer.piece(token)) is None else _CONTROL
        return _USER_DEFINED if token in added else _NORMAL

    return {
        "model": "gpt2",
        "pre": _pre_tokenizer(tree, str(tokenizer.files.path)),
        "tokens": [placeholders.get(token) or tokenizer.piece(token) for token in ids],
        "token_type": [type_of(token) for token in ids],
        "merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in tree["model"]["merges"]],
    }


def _pre_tokenizer(tree: dict[str, Any], where: str) -> str:
    part = tree.get("pre_tokenizer") or {"type": "none"}
    parts = part["pretokenizers"] if part["type"] == "Sequence" else [part]
    rules = tuple((part["type"], _essence(part)) for part in parts), bool(tree["model"].get("ignore_merges"))
    if rules not in _PRE_TOKENIZERS or tree.get("normalizer"):
        raise CheckpointError(
            "llama.cpp has no name for the rules by which the tokenizer splits text",
            where=where,
            fix=f"use a tokenizer.model, or a tokenizer.json like those of {', '.join(_PRE_TOKENIZERS.values())}",
        )
    return _PRE_TOKENIZERS[rules]


def _essence(part: dict[str, Any]) -> Any:
    """Return the setting of a rule that matters; None if another one is unusual."""
    kind = part["type"]
    if kind == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return part["pattern"].get("Regex")
    if kind == "ByteLevel" and not part["add_prefix_space"]:
        return part.get("use_regex", True)
    return part["individual_digits"] if kind == "Digits" else None


def _read(tokenizer: Tokenizer) -> dict[str, Any]:
    assert isinstance(tokenizer, BytePairTokenizer)
    return json.loads(tokenizer.plain_json)
