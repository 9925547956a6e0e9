"""tokenizer.json of Hugging Face with a BPE model, such as Llama 3's and SmolLM2's."""

import copy
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import tokenizers

from megatron_vlm.config import ConfigError
from megatron_vlm.data.text import tokenizer as interface
from megatron_vlm.data.text.tokenizer_files import TokenizerFiles, TokenizerSettings, fingerprint, read_object
from megatron_vlm.platform.threads import keep_tokenizers_in_one_thread

_SECTIONS = ("normalizer", "pre_tokenizer", "decoder")
_PREPEND = {"type": "Prepend", "prepend": "▁"}
_NOT_NEEDED = ("truncation", "padding", "post_processor")


def recognises(files: TokenizerFiles) -> bool:
    """Tell whether the model file is JSON."""
    return files.is_json


class Tokenizer(interface.Tokenizer):
    """A tokenizer of the package `tokenizers`, changed so that no text is encoded to a control token.

    Attributes:
        plain_json: the changed file.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        self.files, where = files, str(files.path)
        tree, settings = read_object(files.model, where), files.settings()
        _check_model(tree, where)
        self._ids = _find_tokens(tree, settings)
        self._texts = {token: text for text, token in self._ids.items()}
        self.vocab_size = max(self._texts) + 1
        self._control = frozenset(_find_control(tree, settings, self._ids))
        bos = settings.bos or _first_token(tree)
        self.bos_id = self._find_end("BOS", bos) if bos and _adds_bos(tree, settings) else None
        if settings.eos is None:
            fix = "keep the tokenizer_config.json that belongs to it in the same folder"
            raise ConfigError("nothing says which token is EOS", where=where, fix=fix)
        self.eos_id = self._find_end("EOS", settings.eos)
        placeholders = {entry["content"] for entry in tree.get("added_tokens") or ()} - self._ids.keys()
        plain = _without(tree, placeholders | {self._texts[token] for token in self._control})
        continuing = without_prefix(plain)
        self.plain_json = json.dumps(plain)
        # Of what it does, not of its bytes: an export of a model adds tokens and rules that have no effect here.
        self.sha256 = fingerprint(self.plain_json.encode(), self._facts_beside())
        keep_tokenizers_in_one_thread()
        self._plain = _build(self.plain_json, where)
        self._continuing = self._plain if continuing == plain else _build(json.dumps(continuing), where)

    def encode(self, text: str, *, continuation: bool = False) -> list[int]:
        """Return the ids of `text`, without BOS and EOS."""
        encoder = self._continuing if continuation else self._plain
        # Unlike `encode`, this does not keep the place of every token in the text.
        return encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Sequence[int], *, continuation: bool = False) -> str:
        """Return the text of ids; control tokens have none."""
        decoder = self._continuing if continuation else self._plain
        return decoder.decode([int(token) for token in ids if not self.is_control(token)])

    def piece(self, token: int) -> str:
        """Return the name of one token."""
        return self._texts.get(int(token), f"<|unused_{token}|>")

    def piece_id(self, piece: str) -> int | None:
        """Return the id of the token with exactly this name, or None."""
        return self._ids.get(piece)

    def is_control(self, token: int) -> bool:
        """Tell whether no text is encoded to this id."""
        return token in self._control or token not in self._texts

    def _find_end(self, what: str, text: str) -> int:
        if text not in self._ids:
            fix = "use the tokenizer_config.json that belongs to the tokenizer.json"
            raise ConfigError(f"tokenizer has no token {text}, its {what}", where=str(self.files.path), fix=fix)
        return self._ids[text]

    def _facts_beside(self) -> dict[str, Any]:
        """Return what the file alone does not say."""
        control = sorted(int(token) for token in self._control)
        return {"bos_id": self.bos_id, "eos_id": self.eos_id, "vocab_size": self.vocab_size, "control": control}


def _check_model(tree: dict[str, Any], where: str) -> None:
    model = tree.get("model")
    try:
        _check_entries(tree)
    except (AttributeError, KeyError, TypeError):
        raise ConfigError("tokenizer.json is damaged", where=where, fix="download the file again") from None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type", "unknown") if isinstance(model, dict) else "missing"
        raise ConfigError(f"model of the tokenizer is {kind}, not BPE", where=where, fix="use a BPE tokenizer")
    parts = _inner(tree.get("pre_tokenizer"))
    spells_bytes = model.get("byte_fallback") or any(part["type"] == "ByteLevel" for part in parts)
    if not spells_bytes and model.get("unk_token") is None:
        what = "tokenizer drops characters that it does not know, without a trace"
        raise ConfigError(what, where=where, fix="use one with byte-level pieces, byte fallback or an unknown token")


def _check_entries(tree: dict[str, Any]) -> None:
    """Touch what is read later without a check."""
    for section in (*_SECTIONS, "post_processor"):
        for part in _inner(tree.get(section)):
            part["type"].upper(), part["type"] == "Replace" and (part["content"].upper(), part["pattern"].get)
    for entry in tree.get("added_tokens") or ():
        entry["content"].upper(), entry["id"] + 1


def _inner(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield a normalizer, pre-tokenizer, decoder or post-processor; of a sequence, also those in it."""
    if part:
        yield part
        for name in ("normalizers", "pretokenizers", "decoders", "processors"):
            for inner in part.get(name) or ():
                yield from _inner(inner)


def _find_tokens(tree: dict[str, Any], settings: TokenizerSettings) -> dict[str, int]:
    """Return all tokens, without those for images and padding that were added at the end."""
    vocab = tree["model"]["vocab"]
    added = {entry["content"]: entry["id"] for entry in tree.get("added_tokens") or ()}
    taken = {*vocab.values(), *added.values()}
    added |= {text: token for text, token in settings.tokens.items() if text not in vocab and token not in taken}
    ids = {**vocab, **added}
    last_of_model = max(token for text, token in vocab.items() if text not in added)
    for text, token in sorted(added.items(), key=lambda entry: -entry[1]):
        if token <= last_of_model or text not in settings.placeholders - {settings.bos, settings.eos}:
            break
        del ids[text]
    return ids


def _find_control(tree: dict[str, Any], settings: TokenizerSettings, ids: dict[str, int]) -> Iterator[int]:
    """Yield tokens that are special, have the form of a marker, or that only the files beside the model name."""
    entries = tree.get("added_tokens") or ()
    in_file = {entry["content"] for entry in entries} | tree["model"]["vocab"].keys()
    special = {entry["content"] for entry in entries if entry.get("special")} | settings.control
    yield from (ids[text] for text in special if text in ids)
    yield from (token for text, token in ids.items() if interface.is_marker(text) or text not in in_file)


def _first_token(tree: dict[str, Any]) -> str | None:
    """Return the token that the file itself puts before a text, with a post-processor or a rule of its normalizer."""
    for part in _inner(tree.get("post_processor")):
        first: dict[str, Any] = (part.get("single") or ({},))[0]
        if part["type"] == "TemplateProcessing" and "SpecialToken" in first:
            return first["SpecialToken"]["id"]
    added = {entry["content"] for entry in tree.get("added_tokens") or ()}
    rules = (part for part in _inner(tree.get("normalizer")) if part["type"] == "Replace")
    return next((part["content"] for part in rules if part["content"] in added), None)


def _adds_bos(tree: dict[str, Any], settings: TokenizerSettings) -> bool:
    """Tell whether samples begin with BOS.

    The settings may say so; else the file may add it to every text; else the chat template may write it, as that of the
    first Llama 3.
    """
    if settings.adds_bos is not None:
        return settings.adds_bos
    return _first_token(tree) is not None or settings.template_writes_bos


def _without(tree: dict[str, Any], control: set[str]) -> dict[str, Any]:
    """Return the file without tokens that no text may become, and without what writes them around a text."""
    model = dict(tree["model"], dropout=None)
    # BPE needs its unknown token, which no merge makes.
    gone = control & model["vocab"].keys() - {model.get("unk_token")}
    if gone:
        model["vocab"] = {text: token for text, token in model["vocab"].items() if text not in gone}
        model["merges"] = [pair for pair in model["merges"] if not gone & set(_merged(pair))]
    added = [entry for entry in tree.get("added_tokens") or () if entry["content"] not in control]
    # The library numbers added tokens anew unless the model has them.
    model["vocab"] = {**model["vocab"], **{entry["content"]: entry["id"] for entry in added}}
    rules = [part for part in _inner(tree.get("normalizer")) if part["type"] != "Sequence"]
    kept = [
        _PREPEND if _writes_mark(part) else part
        for part in rules
        if not (part["type"] == "Replace" and part["content"] in control)
    ]
    normalizer = tree.get("normalizer") if kept == rules else _sequence(kept)
    return {**tree, **dict.fromkeys(_NOT_NEEDED), "model": model, "added_tokens": added, "normalizer": normalizer}


def _writes_mark(part: dict[str, Any]) -> bool:
    """Tell whether a rule writes the word-begin mark after BOS and images, as our exports have it.

    Texts come without either, so what is left of the rule is that it writes the mark before every text.
    """
    return part["type"] == "Replace" and part["content"] == "▁" and "(?<=" in (part["pattern"].get("Regex") or "")


def _sequence(rules: list[dict[str, Any]]) -> dict[str, Any] | None:
    if len(rules) < 2:
        return rules[0] if rules else None
    return {"type": "Sequence", "normalizers": rules}


def _merged(pair: str | Sequence[str]) -> Iterable[str]:
    """Return the two texts of a merge, and the one that they become."""
    left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
    return left, right, left + right


def without_prefix(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the file without the blank or mark that it puts before a text, and takes away from the decoded one."""
    changed = {**tree, **{name: copy.deepcopy(tree.get(name)) for name in _SECTIONS}}
    for section in _SECTIONS:
        for part in _inner(changed[section]):
            if part["type"] == "Metaspace":
                part["prepend_scheme"] = "never"
                part.pop("add_prefix_space", None)
            elif part["type"] == "ByteLevel" and section == "pre_tokenizer":
                part["add_prefix_space"] = False
            elif part["type"] == "Strip" and section == "decoder":
                part["start"] = 0
            elif part["type"] == "Sequence" and section == "normalizer":
                part["normalizers"] = [inner for inner in part["normalizers"] if inner["type"] != "Prepend"]
    if (changed["normalizer"] or {}).get("type") == "Prepend":
        changed["normalizer"] = None
    return changed


def _build(content: str, where: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the package has no class of its own for it
        what = f"tokenizer.json cannot be read: {str(error).splitlines()[0]}"
        raise ConfigError(what, where=where, fix="download the file again") from None
