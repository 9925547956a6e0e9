"""Tokenizer files of an exported model: those of the training, and a tokenizer.json that does the same.

It splits text as training did: where the tokenizer has a word-begin mark, the first text of a sample and the first one
after an image start with it, other text does not. `prompt_rules` has how.
"""

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlm.config import CheckpointError, LanguageConfig
from megatron_vlm.config.modules import find_module
from megatron_vlm.convert.folder import write_json
from megatron_vlm.data.text.tokenizer import Tokenizer
from megatron_vlm.data.text.tokenizer_files import JSON_FILE

logger = logging.getLogger(__name__)

KINDS = "megatron_vlm.convert.files.tokenizers"
"""Package of the kinds of tokenizers, each with the functions that its docstring lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedTokens:
    """Texts of the two tokens that follow the tokenizer's own, and of BOS."""

    image: str
    pad: str
    start: str
    """Text with which a rendered prompt starts: BOS and, if needed, a blank for the word-begin mark after it."""


def write_tokenizer(folder: Path, tokenizer: Tokenizer, language: LanguageConfig) -> AddedTokens:
    """Write tokenizer_config.json, the model if it is no JSON, and, if it can express the same, tokenizer.json.

    Raises:
        CheckpointError: the tokenizer does not have as many tokens as the model expects.
    """
    if tokenizer.vocab_size != language.vocab_size:
        raise CheckpointError(
            f"tokenizer has {tokenizer.vocab_size} pieces, the model {language.vocab_size}",
            where=str(tokenizer.files.path),
            fix="name the tokenizer of the training with --tokenizer",
        )
    kind = find_module(KINDS, tokenizer.kind, "kind of tokenizer")
    image, pad = placeholder_names(tokenizer)
    tokens = _added_tokens(tokenizer, kind.found_in_text(tokenizer))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": True}
    tokens += [
        {"id": language.image_token_id, "content": image, **flags},
        {"id": language.pad_token_id, "content": pad, **flags},
    ]
    tree = kind.tokenizer_json(tokenizer, tokens, image)
    if tree is not None:
        write_json(folder / JSON_FILE, tree)
    else:
        logger.warning(
            "transformers converts this kind of SentencePiece model itself: prompts can get other token ids than in "
            "training"
        )
    if tokenizer.files.name != JSON_FILE:
        (folder / tokenizer.files.name).write_bytes(tokenizer.files.model)
    start = tokenizer.bos if tree is not None or not tokenizer.bos else tokenizer.bos + " "
    added = AddedTokens(image=image, pad=pad, start=start)
    write_json(
        folder / "tokenizer_config.json", _tokenizer_config(tokenizer, language, added, tokens, exact=tree is not None)
    )
    return added


def placeholder_names(tokenizer: Tokenizer) -> tuple[str, str]:
    """Return texts for the tokens of image and padding."""
    texts = {tokenizer.piece(token) for token in range(tokenizer.vocab_size)}
    return _free_name("image", texts), _free_name("pad", texts)


def _free_name(word: str, pieces: Collection[str]) -> str:
    """Return a text that is not a piece: an added token with the text of a piece would get that piece's id."""
    name = f"<{word}>"
    while name in pieces:
        name = f"<|{name[1:-1]}|>"
    return name


def _added_tokens(tokenizer: Tokenizer, found_in_text: dict[int, dict[str, bool]]) -> list[dict[str, Any]]:
    """Return the tokens that are found in a text as a whole.

    They are `normalized`, so that the normalizer sees the whole text, not the stretches between them.
    """
    plain = {"single_word": False, "lstrip": False, "rstrip": False}
    return [
        {
            "id": token,
            "content": tokenizer.piece(token),
            **found_in_text.get(token, plain),
            "normalized": True,
            "special": token not in found_in_text,
        }
        for token in range(tokenizer.vocab_size)
        if token in found_in_text or tokenizer.is_control(token)
    ]


def _tokenizer_config(
    tokenizer: Tokenizer, language: LanguageConfig, added: AddedTokens, tokens: list[dict[str, Any]], *, exact: bool
) -> dict[str, Any]:
    decoder = {
        str(entry["id"]): {name: value for name, value in entry.items() if name != "id"}
        for entry in tokens
        if entry["special"]
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast" if exact else "LlamaTokenizer",
        "processor_class": "LlavaProcessor",
        "added_tokens_decoder": decoder,
        **({"bos_token": tokenizer.bos} if tokenizer.bos else {}),
        "eos_token": tokenizer.piece(tokenizer.eos_id),
        "pad_token": added.pad,
        "image_token": added.image,
        "extra_special_tokens": {"image_token": added.image},
        # The default adds token_type_ids, which `generate` of a Llama rejects.
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": language.max_position_embeddings,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    return (
        config if exact else {**config, "add_bos_token": bool(tokenizer.bos), "add_eos_token": False, "legacy": False}
    )
