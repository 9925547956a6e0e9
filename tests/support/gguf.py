"""The tokenizer inside a GGUF file, in the form of Hugging Face."""

import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _CONTROL = 8, 9, 3


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the keys and values at the beginning of a file."""
    with path.open("rb") as file:
        assert file.read(4) == b"GGUF"
        _, _, count = struct.unpack("<IQQ", file.read(20))
        return {_value(file, _STRING): _value(file, _number(file, "I")) for _ in range(count)}


def _number(file: BinaryIO, kind: str) -> Any:
    return struct.unpack(f"<{kind}", file.read(struct.calcsize(kind)))[0]


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return file.read(_number(file, "Q")).decode()
    if kind == _ARRAY:
        inner, count = _number(file, "I"), _number(file, "Q")
        return [_value(file, inner) for _ in range(count)]
    return _number(file, _NUMBERS[kind])


def write_smollm2_tokenizer(gguf: Path, folder: Path) -> Path:
    """Write tokenizer.json and tokenizer_config.json of SmolLM2 into a folder."""
    found = {key.removeprefix("tokenizer."): value for key, value in read_metadata(gguf).items()}
    texts, kinds = found["ggml.tokens"], found["ggml.token_type"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    control = [token for token, kind in enumerate(kinds) if kind == _CONTROL]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    tree = {
        "version": "1.0",
        "added_tokens": [{"id": token, "content": texts[token], **flags} for token in control],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {text: token for token, text in enumerate(texts)},
            "merges": found["ggml.merges"],
        },
    }
    names = {f"{end}_token": texts[found[f"ggml.{end}_token_id"]] for end in ("bos", "eos")}
    config = {**names, "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": found["chat_template"]}
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"clean_up_tokenization_spaces": False}))
    return folder
