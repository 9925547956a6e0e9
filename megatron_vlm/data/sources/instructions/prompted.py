"""Annotations of vision-language datasets, turned into questions with the wordings of a prompt set."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_vlm.config.prepare import ConversationRules
from megatron_vlm.config.sources.conversations import PromptOptions
from megatron_vlm.data.documents import PLACEHOLDER
from megatron_vlm.data.files.locations import Location
from megatron_vlm.data.files.table_records import read_any_records
from megatron_vlm.data.rejects import RejectError
from megatron_vlm.data.sources.image_store import ImageReader
from megatron_vlm.data.sources.instructions.conversations import make_document
from megatron_vlm.data.sources.instructions.prompt_pools import (
    IMAGE_FIELDS,
    KINDS,
    M3IT_IMAGE,
    PromptSet,
    check_prompt,
    fill,
    without_image_places,
)
from megatron_vlm.data.sources.instructions.record_images import ImageRef, read_refs
from megatron_vlm.data.sources.instructions.records import Conversation
from megatron_vlm.data.sources.source import Found, key_of

_MAX_OPTIONS = 26


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRules:
    """How an annotation becomes a conversation."""

    prompts: PromptSet
    seed: int = PromptOptions().seed
    """Seed for choosing wordings."""
    turns: ConversationRules = ConversationRules()


@dataclass(frozen=True, slots=True)
class PromptedSource:
    """JSON, JSON lines or parquet with annotations, whose fields a prompt set names.

    A list of captions becomes one document per caption; lists of questions and answers become one conversation. Of
    several answers to one question, the most frequent is used, or the first of equally frequent ones.

    The wording is chosen by a hash of the seed, the record's key (else its file and line) and the number of the
    question, so it depends neither on other records nor on workers.
    """

    inputs: tuple[Location, ...]
    rules: PromptRules

    def read(self, path: Location, images: ImageReader) -> Iterator[Found]:
        """Yield the conversations of one file, rendered in the template."""
        rules = self.rules.turns
        for line, value in read_any_records(path, max_bytes=rules.max_record_bytes):
            key = None
            try:
                if isinstance(value, RejectError):
                    raise value
                key = key_of(_first(value, self.rules.prompts.fields.get("key", ("id",))))
                captions = self._captions(value)
            except RejectError as error:
                yield Found(line, key, error)
                continue
            identity = key or f"{path.name}:{line}"
            for number, caption in enumerate(captions):
                try:
                    conversation = self._conversation(value, caption, (identity, number))
                    yield Found(line, key, make_document(conversation, images, rules))
                except RejectError as error:
                    yield Found(line, key, error)

    def _captions(self, record: dict[str, Any]) -> list[Any]:
        """Return the captions of the documents one by one, or all answers of the only document."""
        prompts = self.rules.prompts
        answers = _needed(record, prompts, KINDS[prompts.kind].answer)
        return answers if prompts.kind == "caption" and isinstance(answers, list) else [answers]

    def _conversation(self, record: dict[str, Any], answers: Any, identity: tuple[str, int]) -> Conversation:
        prompts = self.rules.prompts
        kind = KINDS[prompts.kind]
        images = _images(record, prompts)
        if prompts.kind == "caption":
            return Conversation([self._exchange(record, {}, answers, identity)], images)
        asked = _needed(record, prompts, kind.needed[0])
        if not isinstance(asked, list):
            return Conversation([self._exchange(record, {kind.needed[0]: asked}, answers, identity)], images)
        if not isinstance(answers, list) or len(answers) != len(asked):
            count = len(answers) if isinstance(answers, list) else 1
            raise RejectError("answer_count", f"{len(asked)} questions, but {count} answers")
        exchanges = [
            self._exchange(record, {kind.needed[0]: question}, answer, (identity[0], number))
            for number, (question, answer) in enumerate(zip(asked, answers, strict=True))
        ]
        return Conversation(exchanges, images)

    def _exchange(
        self, record: dict[str, Any], slots: dict[str, Any], answer: Any, identity: tuple[str, int]
    ) -> tuple[str, str]:
        """Return one question and its answer."""
        prompts = self.rules.prompts
        kind = KINDS[prompts.kind]
        texts = {name: _text(value, name) for name, value in slots.items()}
        said = {kind.answer: _answer(answer, kind.answer)}
        if prompts.kind == "multiple_choice":
            options = _options(_needed(record, prompts, "options"))
            texts["options"] = "\n".join(f"{letter}. {text}" for letter, text in options.items())
            said |= _chosen(options, answer)
        for name in kind.optional:
            value = _first(record, prompts.fields.get(name, ()))
            if value not in (None, "", []):
                texts[name] = ", ".join(_text(one, name) for one in (value if isinstance(value, list) else [value]))
        is_first = identity[1] == 0 or prompts.kind == "caption"
        pool = prompts.prompts if is_first else without_image_places(prompts)
        usable = [text for text in pool if set(check_prompt(text, kind.slots, "prompt")) <= texts.keys()]
        if not usable:
            raise RejectError("field_missing", f"every prompt needs more than {', '.join(texts) or 'an image'}")
        text = usable[choose(self.rules.seed, *identity, len(usable))]
        return fill(text, texts), fill(prompts.answer_text, said)


def choose(seed: int, identity: str, number: int, count: int) -> int:
    """Choose one of `count` wordings for a question; depends only on the arguments."""
    digest = hashlib.blake2b(f"{seed}\0{identity}\0{number}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % count


def find_value(record: dict[str, Any], name: str) -> Any:
    """Return the value of a name: a field, a path with dots, or text with fields in braces; None if there is none.

    Example: `qa.question` of `{"qa": [{"question": "a?"}, {"question": "b?"}]}` is `["a?", "b?"]`.
    """
    if "{" in name:
        try:
            return name.format_map(record)
        except (KeyError, ValueError, TypeError):
            return None
    if name in record:
        return record[name]
    return _follow(record, name.split("."))


def _follow(value: Any, path: list[str]) -> Any:
    if not path or value is None:
        return value
    if isinstance(value, list):
        found = [_follow(one, path) for one in value]
        return None if None in found else found
    return _follow(value.get(path[0]), path[1:]) if isinstance(value, dict) else None


def _first(record: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((value for name in names if (value := find_value(record, name)) is not None), None)


def _needed(record: dict[str, Any], prompts: PromptSet, slot: str) -> Any:
    value = _first(record, prompts.fields[slot])
    if value in (None, "", []):
        raise RejectError("field_missing", f"no {slot}: the record has none of {', '.join(prompts.fields[slot])}")
    return value


def _images(record: dict[str, Any], prompts: PromptSet) -> list[ImageRef]:
    fields = {slot: prompts.fields[slot] for slot in IMAGE_FIELDS if slot in prompts.fields}
    if not fields:
        return []
    fields.setdefault("image_base64", M3IT_IMAGE)
    for slot, names in fields.items():
        if refs := read_refs(_first(record, names), slot, is_base64=slot == "image_base64"):
            return refs
    raise RejectError("image_missing", f"the record has none of {', '.join(sum(fields.values(), ()))}")


def _text(value: Any, name: str) -> str:
    """Return a value as text without placeholders of images."""
    if isinstance(value, bool):
        value = "true" if value else "false"
    elif isinstance(value, (int, float)):
        value = str(value)
    if not isinstance(value, str):
        raise RejectError("json_type", f"{name} is {type(value).__name__}, not text")
    return value.replace(PLACEHOLDER, PLACEHOLDER.upper())


def _answer(value: Any, name: str) -> str:
    """Return the most frequent of several answers, or the only one."""
    counts = Counter(_text(one, name) for one in (value if isinstance(value, list) else [value]))
    text = max(counts, key=counts.__getitem__, default="")
    if not text.strip():
        raise RejectError("empty_text", f"{name} is empty")
    return text


def _options(value: Any) -> dict[str, str]:
    """Return the options by letter."""
    if isinstance(value, dict):
        return {str(letter): _text(text, "options") for letter, text in value.items()}
    if not isinstance(value, list) or len(value) > _MAX_OPTIONS:
        raise RejectError("json_type", f"options are not a list of at most {_MAX_OPTIONS} texts")
    return {chr(ord("A") + number): _text(text, "options") for number, text in enumerate(value)}


def _chosen(options: dict[str, str], answer: Any) -> dict[str, str]:
    """Return letter and text of the option that the answer names, by text, letter or number from 0."""
    letters = list(options)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(letters):
        return {"letter": letters[answer], "answer": options[letters[answer]]}
    if isinstance(answer, str):
        same = (letter for letter in letters if options[letter] == answer)
        if (letter := next(same, answer.strip())) in options:
            return {"letter": letter, "answer": options[letter]}
    raise RejectError("answer_option", f"answer {str(answer)[:50]!r} is not one of {len(options)} options")
