"""Tokenizer files of an exported model: the SentencePiece model itself and the same vocabulary as tokenizer.json.

transformers 4 and 5 each convert a SentencePiece model in their own way, but both read tokenizer.json unchanged. It
splits text as training did: the first text of a sample and the first one after an image start with the word-begin mark,
other text does not. `prompt_rules` has how.

Runs of more than 14 blanks may be split differently than by SentencePiece, which gives all of these pieces the same
score.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from megatron_vlm.config import CheckpointError, LanguageConfig
from megatron_vlm.convert.files.prompt_rules import WORD_BEGIN, normalizer
from megatron_vlm.convert.folder import write_json
from megatron_vlm.data.text.tokenizer import Tokenizer
from megatron_vlm.data.text.tokenizer_files import MODEL_FILE

logger = logging.getLogger(__name__)

# Values of the enumerations in sentencepiece_model.proto.
_BPE = 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedTokens:
    """Texts of the two tokens that follow the tokenizer's own, and of BOS."""

    image: str
    pad: str
    start: str
    """Text with which a rendered prompt starts: BOS and, if needed, a blank for the word-begin mark after it."""


def write_tokenizer(folder: Path, tokenizer_path: Path, tokenizer: Tokenizer, language: LanguageConfig) -> AddedTokens:
    """Write tokenizer.model, tokenizer_config.json and, if it can express the same, tokenizer.json.

    Raises:
        CheckpointError: the tokenizer does not have as many pieces as the model expects.
    """
    if tokenizer.vocab_size != language.vocab_size:
        raise CheckpointError(
            f"tokenizer has {tokenizer.vocab_size} pieces, the model {language.vocab_size}",
            where=str(tokenizer_path),
            fix="name the tokenizer of the training with --tokenizer",
        )
    if tokenizer.files.is_json:
        raise CheckpointError(
            "a tokenizer.json cannot be exported", where=str(tokenizer_path), fix="use a SentencePiece model"
        )
    content = tokenizer_path.read_bytes()
    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(content)
    (folder / MODEL_FILE).write_bytes(content)
    pieces = {piece.piece for piece in model.pieces}
    exact, bos = _can_be_json(model), bos_text(tokenizer)
    start = bos if exact else bos + " "
    added = AddedTokens(image=_free_name("image", pieces), pad=_free_name("pad", pieces), start=start)
    tokens = _added_tokens(model, tokenizer, language, added)
    if exact:
        write_json(folder / "tokenizer.json", _tokenizer_json(model, tokenizer, added, tokens))
    else:
        logger.warning(
            "transformers converts this kind of SentencePiece model itself: prompts can get other token ids than in "
            "training"
        )
    write_json(folder / "tokenizer_config.json", _tokenizer_config(tokenizer, language, added, tokens, exact=exact))
    return added


def bos_text(tokenizer: Tokenizer) -> str:
    """Return the text of the token that starts a sample.

    Raises:
        CheckpointError: samples start without one.
    """
    if tokenizer.bos_id is None:
        raise CheckpointError("tokenizer has no BOS", where=str(tokenizer.files.path), fix="use another tokenizer")
    return tokenizer.piece(tokenizer.bos_id)


def _free_name(word: str, pieces: set[str]) -> str:
    """Return a text that is not a piece: an added token with the text of a piece would get that piece's id."""
    name = f"<{word}>"
    while name in pieces:
        name = f"<|{name[1:-1]}|>"
    return name


def _can_be_json(model: Any) -> bool:
    spec = model.normalizer_spec
    return (
        model.trainer_spec.model_type == _BPE
        and not spec.precompiled_charsmap
        and not spec.remove_extra_whitespaces
        and not model.trainer_spec.treat_whitespace_as_suffix
    )


def _added_tokens(
    model: Any, tokenizer: Tokenizer, language: LanguageConfig, added: AddedTokens
) -> list[dict[str, Any]]:
    """Return the tokens that are found in a text as a whole: the control and user-defined pieces, and the two new ones.

    They are `normalized`, so that the normalizer sees the whole text, not the stretches between them.
    """
    found = {token: (piece.piece, piece.type) for token, piece in enumerate(model.pieces)}
    # What the folder of the tokenizer adds to its vocabulary.
    for token in range(len(model.pieces), tokenizer.vocab_size):
        found[token] = (tokenizer.piece(token), _CONTROL if tokenizer.is_control(token) else _USER_DEFINED)
    found |= {language.image_token_id: (added.image, _CONTROL), language.pad_token_id: (added.pad, _CONTROL)}
    ends = (one for one in (tokenizer.bos_id, tokenizer.eos_id) if one is not None)
    found |= {one: (tokenizer.piece(one), _CONTROL) for one in ends}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    return [
        {"id": token, "content": content, **flags, "special": kind == _CONTROL}
        for token, (content, kind) in sorted(found.items())
        if kind in (_CONTROL, _USER_DEFINED)
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
        "bos_token": bos_text(tokenizer),
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
    return config if exact else {**config, "add_bos_token": True, "add_eos_token": False, "legacy": False}


def _tokenizer_json(
    model: Any, tokenizer: Tokenizer, added: AddedTokens, tokens: list[dict[str, Any]]
) -> dict[str, Any]:
    has_word_begin = bool(model.normalizer_spec.add_dummy_prefix)
    rules = normalizer(
        bos=bos_text(tokenizer),
        image=added.image,
        added=[entry["content"] for entry in tokens],
        word_begin=has_word_begin,
    )
    blank = {"type": "Replace", "pattern": {"String": " "}, "content": WORD_BEGIN}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": tokens,
        "normalizer": {"type": "Sequence", "normalizers": [*rules, blank]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": WORD_BEGIN}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if has_word_begin else []),
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next(piece.piece for piece in model.pieces if piece.type == _UNKNOWN),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": bool(model.trainer_spec.byte_fallback),
            "ignore_merges": False,
            "vocab": {piece.piece: token for token, piece in enumerate(model.pieces)},
            "merges": _merges(model),
        },
    }


def _merges(model: Any) -> list[list[str]]:
    """Return the pairs that form a piece, in the order in which SentencePiece merges them: best score first."""
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == _NORMAL}
    ids = {piece.piece: token for token, piece in enumerate(model.pieces)}
    merges = [
        (-score, ids[piece[:cut]], ids[piece[cut:]], [piece[:cut], piece[cut:]])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [pair for *_, pair in sorted(merges, key=lambda entry: entry[:3])]
