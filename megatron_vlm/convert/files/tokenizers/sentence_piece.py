"""SentencePiece models as tokenizer.json.

transformers 4 and 5 each convert a SentencePiece model in their own way, but both read tokenizer.json unchanged. Runs
of more than 14 blanks may be split differently than by SentencePiece, which gives all of these pieces the same score.
"""

from collections.abc import Mapping
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from megatron_vlm.config import CheckpointError
from megatron_vlm.convert.files.prompt_rules import WORD_BEGIN, normalizer
from megatron_vlm.data.text.tokenizer import Tokenizer

# Values of the enumerations in sentencepiece_model.proto.
_BPE = 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4


def found_in_text(tokenizer: Tokenizer) -> dict[int, dict[str, bool]]:
    """Return the pieces that users defined, apart from control tokens."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    pieces = enumerate(_read_model(tokenizer).pieces)
    return {token: flags for token, piece in pieces if piece.type == _USER_DEFINED and not tokenizer.is_control(token)}


def _read_model(tokenizer: Tokenizer) -> Any:
    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(tokenizer.files.model)
    return model


def tokenizer_json(tokenizer: Tokenizer, tokens: list[dict[str, Any]], image: str) -> dict[str, Any] | None:
    """Return a file that encodes as the model does; None if there is no such file.

    Args:
        tokenizer: of this kind.
        tokens: all added tokens, with their flags.
        image: text of the placeholder.
    """
    model = _read_model(tokenizer)
    if not _is_plain_bpe(model):
        return None
    has_word_begin = bool(model.normalizer_spec.add_dummy_prefix)
    texts = [entry["content"] for entry in tokens]
    rules = normalizer(bos=tokenizer.bos, image=image, added=texts, word_begin=has_word_begin)
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


def ggml_vocabulary(tokenizer: Tokenizer, placeholders: Mapping[int, str]) -> dict[str, Any]:
    """Return pieces, scores and types, whose numbers llama.cpp has from SentencePiece.

    Raises:
        CheckpointError: llama.cpp cannot split text as the model does.
    """
    model = _read_model(tokenizer)
    if not _is_plain_bpe(model):
        raise CheckpointError(
            "llama.cpp knows SentencePiece only as BPE without a normalization",
            where=str(tokenizer.files.path),
            fix="use --format llava",
        )
    ids = range(tokenizer.vocab_size + len(placeholders))
    own = {token: (piece.piece, piece.score, piece.type) for token, piece in enumerate(model.pieces)}
    added = {
        token: (placeholders.get(token) or tokenizer.piece(token), 0.0, _CONTROL) for token in ids if token not in own
    }
    pieces = {**own, **added}
    return {
        "model": "llama",
        "tokens": [pieces[token][0] for token in ids],
        "scores": [pieces[token][1] for token in ids],
        "token_type": [_CONTROL if tokenizer.is_control(token) else pieces[token][2] for token in ids],
        "unknown_token_id": next(token for token, piece in own.items() if piece[2] == _UNKNOWN),
        "add_space_prefix": bool(model.normalizer_spec.add_dummy_prefix),
    }


def _is_plain_bpe(model: Any) -> bool:
    spec = model.normalizer_spec
    return (
        model.trainer_spec.model_type == _BPE
        and not spec.precompiled_charsmap
        and not spec.remove_extra_whitespaces
        and not model.trainer_spec.treat_whitespace_as_suffix
    )


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
