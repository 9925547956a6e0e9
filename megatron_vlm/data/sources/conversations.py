"""LLaVA-like instruction data: conversations about images."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_vlm.data.documents import PLACEHOLDER, Document, RejectError, TextRules, clean_text
from megatron_vlm.data.sources.image_store import ImageReader
from megatron_vlm.data.sources.records import MAX_RECORD_BYTES, field, read_records
from megatron_vlm.data.sources.source import Found, ReadContext, key_of
from megatron_vlm.data.templates import (
    DEFAULT_SYSTEM,
    Turn,
    find_template,
    render_conversation,
    split_placeholders,
)

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationRules:
    """How a record becomes a document."""

    template: str = "vicuna_v1"
    system: Literal["default", "none"] | str = "default"  # noqa: PYI051 - the two words mean something
    """System prompt: the template's own, none, or this text."""
    image_position: Literal["keep", "front"] = "keep"
    """Where a question's images stand: where its placeholders do, or on lines of their own before its text."""
    text: TextRules = TextRules()
    max_record_bytes: int = MAX_RECORD_BYTES

    @property
    def system_text(self) -> object:
        """What `render_conversation` is given."""
        return {"default": DEFAULT_SYSTEM, "none": None}.get(self.system, self.system)


@dataclass(frozen=True, slots=True)
class ConversationSource:
    """JSON as LLaVA publishes it: `id`, `image` (a path, or several) and `conversations` of `from` and `value`.

    Placeholders stand in questions only. A conversation with images but without any placeholder gets them in front of
    its first question. A first turn of the assistant is left out.

    Source: LLaVA, llava/train/train.py, preprocess_multimodal; VILA-1.5, llava/data/dataset.py.
    """

    inputs: tuple[Path, ...]
    rules: ConversationRules = ConversationRules()

    def read(self, path: Path, context: ReadContext) -> Iterator[Found]:
        """Yield the conversations of one file, rendered in the template."""
        for line, value in read_records(path, max_bytes=self.rules.max_record_bytes):
            if isinstance(value, RejectError):
                yield Found(line, None, value)
                continue
            key = key_of(value.get("id"))
            try:
                yield Found(line, key, self._document(value, context.images))
            except RejectError as error:
                yield Found(line, key, error)

    def _document(self, record: dict[str, Any], images: ImageReader) -> Document:
        system, exchanges = _exchanges(field(record, "conversations", list))
        if sum(len(text) for exchange in exchanges for text in exchange) > self.rules.text.max_characters:
            raise RejectError("text_too_long", f"more than {self.rules.text.max_characters} characters")
        names = _image_names(record)
        counts = [question.count(PLACEHOLDER) for question, _ in exchanges]
        if names and not any(counts):
            counts[0] = len(names)
            exchanges[0] = (f"{PLACEHOLDER}\n" * len(names) + exchanges[0][0], exchanges[0][1])
        if sum(counts) != len(names):
            raise RejectError("placeholder_count", f"{sum(counts)} placeholders for {len(names)} images")
        found = [images.find(name) for name in names]
        turns = []
        for (question, answer), count in zip(exchanges, counts, strict=True):
            own, found = found[:count], found[count:]
            turns.append(self._turn(question, answer, own))
        template = find_template(self.rules.template)
        return render_conversation(turns, template, self.rules.system_text if system is None else system)

    def _turn(self, question: str, answer: str, images: list[bytes]) -> Turn:
        if self.rules.image_position == "front" and images:
            question = f"{PLACEHOLDER}\n" * len(images) + question.replace(PLACEHOLDER, "").strip()
        for chunk in question.split(PLACEHOLDER):
            clean_text(chunk, self.rules.text)
        return Turn(split_placeholders(question, images), clean_text(answer, self.rules.text))


def _exchanges(messages: list[Any]) -> tuple[str | None, list[tuple[str, str]]]:
    """Return the system prompt, if there is one, and the questions with their answers."""
    turns: list[tuple[str, str]] = []
    for message in messages:
        if not isinstance(message, dict):
            raise RejectError("json_type", "conversations has an entry that is no object")
        name = field(message, "from", str)
        if name not in _ROLES:
            raise RejectError("turn_order", f"a turn is from {name[:50]!r}, not from human or gpt")
        turns.append((_ROLES[name], field(message, "value", str)))
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else None
    if turns and turns[0][0] == "assistant":
        turns.pop(0)
    roles = [role for role, _ in turns]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise RejectError("turn_order", f"{len(roles)} turns do not alternate between question and answer")
    return system, [(turns[i][1], turns[i + 1][1]) for i in range(0, len(turns), 2)]


def _image_names(record: dict[str, Any]) -> list[str]:
    value = record.get("image")
    if value is None:
        return []
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in names):
        raise RejectError("json_type", "image is neither a path nor a list of paths")
    return names
