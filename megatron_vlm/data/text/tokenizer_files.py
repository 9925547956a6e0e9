"""The files of a tokenizer: the model itself, and the settings that Hugging Face keeps beside it."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vlm.config import ConfigError
from megatron_vlm.data.documents import PLACEHOLDER

MODEL_FILE, JSON_FILE = "tokenizer.model", "tokenizer.json"
"""Names in a folder, a Hugging Face model's or a run's: a SentencePiece model, a file of the package `tokenizers`."""
_CONFIG_FILE, _MAP_FILE, _ADDED_FILE = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_TEMPLATE_FILE, _PROCESSOR_TEMPLATE_FILE = "chat_template.jinja", "chat_template.json"
_SETTINGS_FILES = (_CONFIG_FILE, _MAP_FILE, _ADDED_FILE, _TEMPLATE_FILE)
_FIX = "give a tokenizer.model, a tokenizer.json, or a folder that holds one"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSettings:
    """What the files beside a model say; nothing if there are none."""

    bos: str | None = None
    """Text of the token that begins a sample."""
    eos: str | None = None
    """Text of the token that ends a sample."""
    adds_bos: bool | None = None
    """Whether a text is given BOS; None if the files do not say so."""
    template_writes_bos: bool = False
    """Whether the chat template begins with BOS."""
    tokens: Mapping[str, int] = field(default_factory=dict)
    """Ids of the tokens that were added to the model, by their text."""
    control: frozenset[str] = frozenset()
    """Texts of tokens that the files call special."""
    placeholders: frozenset[str] = frozenset((PLACEHOLDER,))
    """Texts of tokens for images and padding."""


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """The files of one tokenizer, by their names in a folder."""

    path: Path
    """The model file, as it was found."""
    model: bytes
    beside: dict[str, bytes]

    @property
    def name(self) -> str:
        """Name of the model file in a folder of its own."""
        return JSON_FILE if self.is_json else MODEL_FILE

    @property
    def is_json(self) -> bool:
        """Whether the model is JSON, not a SentencePiece model."""
        return self.model.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"

    def settings(self) -> TokenizerSettings:
        """Read the files beside the model.

        Raises:
            ConfigError: one of them is damaged.
        """
        config, names = self._read(_CONFIG_FILE), self._read(_MAP_FILE)
        decoder = config.get("added_tokens_decoder") or {}
        try:
            tokens = {text: int(token) for text, token in self._read(_ADDED_FILE).items()}
            tokens |= {entry["content"]: int(token) for token, entry in decoder.items()}
            control = {entry["content"] for entry in decoder.values() if entry.get("special")}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ConfigError(
                "list of added tokens is damaged", where=str(self.path.parent), fix="download the folder again"
            ) from None
        named = {key: _text_of(config.get(key)) or _text_of(names.get(key)) for key in ("bos_token", "eos_token")}
        placeholders = {PLACEHOLDER, *_texts(config, "image_token", "pad_token"), *_texts(names, "pad_token")}
        template = self.beside.get(_TEMPLATE_FILE, b"").decode(errors="replace") or json.dumps(
            config.get("chat_template")
        )
        return TokenizerSettings(
            bos=named["bos_token"],
            eos=named["eos_token"],
            adds_bos=config.get("add_bos_token"),
            template_writes_bos="bos_token" in template,
            tokens=tokens,
            control=frozenset((*control, *_special_texts(config), *_special_texts(names))),
            placeholders=frozenset(placeholders),
        )

    def copy_to(self, folder: Path) -> None:
        """Write the files into a folder, in place of those of another tokenizer."""
        written = {self.name: self.model, **self.beside}
        for name in {MODEL_FILE, JSON_FILE, *_SETTINGS_FILES} - written.keys():
            (folder / name).unlink(missing_ok=True)
        for name, content in written.items():
            (folder / name).write_bytes(content)

    def _read(self, name: str) -> dict[str, Any]:
        if name not in self.beside:
            return {}
        return read_object(self.beside[name], str(self.path.parent / name))


def find_tokenizer(folder: Path) -> Path | None:
    """Return the tokenizer's model file in a folder, or None.

    A SentencePiece model goes before a tokenizer.json, which is made from it, often with small differences.
    """
    candidates = (folder / MODEL_FILE, folder / JSON_FILE)
    return next((path for path in candidates if path.is_file()), None)


def read_tokenizer_files(path: str | Path) -> TokenizerFiles:
    """Read the files of a tokenizer.

    Args:
        path: the model file, or its folder. The settings are read from beside a file with its usual name,
            `tokenizer.model` or `tokenizer.json`; a file with another name stands for itself.

    Raises:
        ConfigError: there is no tokenizer, or a file cannot be read.
    """
    given = Path(path)
    found = find_tokenizer(given) if given.is_dir() else given
    if found is None:
        raise ConfigError(f"folder has no {MODEL_FILE} and no {JSON_FILE}", where=str(given), fix=_FIX)
    content = _content(found)
    if not content:
        raise ConfigError("tokenizer file is empty", where=str(found), fix="copy it again")
    beside = {}
    if found.name in (MODEL_FILE, JSON_FILE):
        beside = {name: _content(found.with_name(name)) for name in _SETTINGS_FILES if found.with_name(name).is_file()}
    return TokenizerFiles(found, content, beside)


def read_chat_template(folder: Path) -> str | None:
    """Return the chat template of a folder, wherever it stands; None without one.

    Raises:
        ConfigError: a file cannot be read or is damaged.
    """
    if (folder / _TEMPLATE_FILE).is_file():
        return _content(folder / _TEMPLATE_FILE).decode(errors="replace")
    for path in (folder / _PROCESSOR_TEMPLATE_FILE, folder / _CONFIG_FILE):
        template = read_object(_content(path), str(path)).get("chat_template") if path.is_file() else None
        if template is not None:
            return template if isinstance(template, str) else json.dumps(template)
    return None


def read_object(content: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object of a file.

    Raises:
        ConfigError: it is damaged, or not an object.
    """
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"file is no JSON: {error}", where=where, fix="download it again") from None
    if not isinstance(record, dict):
        raise ConfigError("file holds no JSON object", where=where, fix="download it again")
    return record


def fingerprint(model: bytes, facts: Mapping[str, Any]) -> str:
    """Return the sha256 of a model together with facts that its file does not hold."""
    digest = hashlib.sha256(model)
    if facts:
        digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"tokenizer cannot be read: {error.strerror}", where=str(path), fix=_FIX) from None


def _text_of(entry: Any) -> str | None:
    """Return the text of a token, which files give as it is or with its flags."""
    return entry if isinstance(entry, str) else entry.get("content") if isinstance(entry, dict) else None


def _texts(record: Mapping[str, Any], *keys: str) -> Iterator[str]:
    yield from (text for key in keys if (text := _text_of(record.get(key))))


def _special_texts(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield the texts of special tokens in tokenizer_config.json or special_tokens_map.json."""
    yield from _texts(record, "bos_token", "eos_token", "unk_token", "pad_token", "image_token")
    for key in ("additional_special_tokens", "extra_special_tokens"):
        entries = record.get(key) or ()
        values = entries.values() if isinstance(entries, dict) else entries if isinstance(entries, list) else ()
        yield from (text for entry in values if (text := _text_of(entry)))
