"""Tokenizer files of an exported model: the SentencePiece model itself and the same vocabulary as tokenizer.json.

transformers 4 and 5 each convert a SentencePiece model in their own way, but both read tokenizer.json unchanged. It
splits text as training did:

- the first text of a sample starts with the word-begin mark;
- text after a control token does not;
- text after an image does; here, only if it starts with a line break, the convention of LLaVA's prompts, because a
  tokenizer cannot see which added token precedes a text.

Runs of more than 14 blanks may be split differently than by SentencePiece, which gives all of these pieces the same
score.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from megatron_vlm.config import CheckpointError, LanguageConfig
from megatron_vlm.convert.folder import write_json
from megatron_vlm.data.text.tokenizer import Tokenizer
from megatron_vlm.data.text.tokenizer_files import MODEL_FILE

logger = logging.getLogger(__name__)

_WORD_BEGIN = "\u2581"
# Values of the enumerations in sentencepiece_model.proto.
_BPE = 2
_NORMAL, _UNKNOWN, _USER_DEFINED = 1, 2, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedTokens:
    """Texts of the two tokens that follow the tokenizer's own."""

    image: str
    pad: str


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
    added = AddedTokens(image=_free_name("image", pieces), pad=_free_name("pad", pieces))
    exact = _can_be_json(model)
    if exact:
        write_json(folder / "tokenizer.json", _tokenizer_json(model, tokenizer, language, added))
    else:
        logger.warning("no tokenizer.json for this kind of SentencePiece model; transformers converts it itself")
    write_json(folder / "tokenizer_config.json", _tokenizer_config(tokenizer, language, added, exact=exact))
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
    normalizer = model.normalizer_spec
    return (
        model.trainer_spec.model_type == _BPE
        and normalizer.add_dummy_prefix
        and not normalizer.precompiled_charsmap
        and not normalizer.remove_extra_whitespaces
        and not model.trainer_spec.treat_whitespace_as_suffix
    )


def _added_tokens(tokenizer: Tokenizer, language: LanguageConfig, added: AddedTokens) -> list[dict[str, Any]]:
    tokens = {
        tokenizer.piece_id(bos_text(tokenizer)): bos_text(tokenizer),
        tokenizer.eos_id: tokenizer.piece(tokenizer.eos_id),
        language.image_token_id: added.image,
        language.pad_token_id: added.pad,
    }
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": token, "content": content, **flags} for token, content in sorted(tokens.items())]


def _tokenizer_config(
    tokenizer: Tokenizer, language: LanguageConfig, added: AddedTokens, *, exact: bool
) -> dict[str, Any]:
    decoder = {
        str(entry["id"]): {name: value for name, value in entry.items() if name != "id"}
        for entry in _added_tokens(tokenizer, language, added)
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


def _tokenizer_json(model: Any, tokenizer: Tokenizer, language: LanguageConfig, added: AddedTokens) -> dict[str, Any]:
    added_tokens = _added_tokens(tokenizer, language, added)
    for token, piece in enumerate(model.pieces):
        if piece.type == _USER_DEFINED:
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
            added_tokens.append({"id": token, "content": piece.piece, **flags})
    bos = bos_text(tokenizer)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added_tokens, key=lambda entry: entry["id"]),
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Replace", "pattern": {"Regex": r"\A\n"}, "content": _WORD_BEGIN + "\n"},
                {"type": "Replace", "pattern": {"String": " "}, "content": _WORD_BEGIN},
            ],
        },
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": _WORD_BEGIN,
            "prepend_scheme": "first",
            "split": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _WORD_BEGIN}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
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
