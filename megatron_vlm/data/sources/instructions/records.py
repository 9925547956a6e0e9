"""Instruction data in its published forms; the fields of a record tell its form."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_vlm.data.documents import PLACEHOLDER
from megatron_vlm.data.files.records import field
from megatron_vlm.data.rejects import RejectError
from megatron_vlm.data.sources.instructions.m3it import split_dialog
from megatron_vlm.data.sources.instructions.record_images import ImageRef, find_images, read_ref

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_LISTS = ("conversations", "messages")


@dataclass(slots=True)
class Conversation:
    """Questions and answers of a record, not cleaned and not in a template."""

    exchanges: list[tuple[str, str]]
    images: list[ImageRef]
    """In the order of their placeholders in the questions; if there is no placeholder, they come first."""
    system: str | None = None

    @property
    def num_characters(self) -> int:
        """Length of all questions and answers."""
        return sum(len(text) for exchange in self.exchanges for text in exchange)


class _Form(NamedTuple):
    """A question and its answer as two fields of a record."""

    question: str
    answer: str
    more: str | None = None
    """An optional field that continues the question."""
    separator: str = "\n"
    """Text between `question` and `more`."""


# If a record fits several forms, the first one is used. VILA's script puts nothing between instruction and inputs.
_FORMS = (
    _Form("instruction", "outputs", "inputs", ""),
    _Form("instruction", "output", "input"),
    _Form("instruction", "response", "context"),
    _Form("question", "answer"),
    _Form("question", "response"),
    _Form("prompt", "response"),
    _Form("prompt", "completion"),
    _Form("inputs", "targets"),
)


def read_conversation(record: dict[str, Any]) -> Conversation:
    """Return the conversation of a record; its fields tell which form it has.

    | fields | known from |
    |---|---|
    | conversations: list of from, value | LLaVA, ShareGPT4V |
    | messages: list of role, content; content a text, or a list of text and image parts | OpenAI, LLaVA-OneVision |
    | instruction, inputs, outputs | M3IT |
    | instruction, input, output; instruction, context, response | Alpaca; Dolly |
    | question, answer; question, response; prompt, response; prompt, completion | VILA's FLAN; OpenOrca |
    | inputs, targets | FLAN |

    Images are found by `find_images`. Each part of a list in `content` becomes a line. A field that is null counts as
    missing.

    Raises:
        RejectError: unknown_fields: the record has none of these forms; json_type, turn_order or empty_text: something
            is wrong with the form it has.
    """
    if name := _list_of(record):
        return _read_list(record, name)
    # A form with one of its two fields tells better what is wrong than no form.
    if (form := _form_of(record, all) or _form_of(record, any)) is None:
        fields = ", ".join(sorted(map(str, record))) or "nothing"
        raise RejectError("unknown_fields", f"no known form of instruction data has the fields {fields}")
    question, answer = field(record, form.question, str), field(record, form.answer, str)
    if not answer.strip():
        raise RejectError("empty_text", f"{form.answer} is empty")
    if form.more is not None and record.get(form.more):
        question += form.separator + field(record, form.more, str)
    images = find_images(record)
    exchanges = split_dialog(question, answer) if images else [(question, answer)]
    _check_answers(exchanges)
    system = record.get("system_prompt")  # OpenOrca's
    return Conversation(exchanges, images, system if isinstance(system, str) and system else None)


def has_form(record: dict[str, Any]) -> bool:
    """Tell whether a record has all fields of one of the forms of `read_conversation`."""
    return bool(_list_of(record) or _form_of(record, all))


def _list_of(record: dict[str, Any]) -> str | None:
    return next((name for name in _LISTS if _has(record, name)), None)


def _form_of(record: dict[str, Any], has: Callable[[Iterable[bool]], bool]) -> _Form | None:
    return next((form for form in _FORMS if has(_has(record, name) for name in form[:2])), None)


def _has(record: dict[str, Any], name: str) -> bool:
    """Tell whether a field has a value; a table of several datasets has null where a dataset lacks a column."""
    return record.get(name) is not None


def _check_answers(exchanges: list[tuple[str, str]]) -> None:
    for number, (_, answer) in enumerate(exchanges, start=1):
        if not answer.strip():
            raise RejectError("empty_text", f"answer {number} of {len(exchanges)} is empty")


def _read_list(record: dict[str, Any], name: str) -> Conversation:
    images = find_images(record)
    turns: list[tuple[str, str]] = []
    places: list[ImageRef | None] = []
    for message in field(record, name, list):
        if not isinstance(message, dict):
            raise RejectError("json_type", f"{name} has an entry that is not an object")
        role, text, own = _read_message(message)
        turns.append((role, text))
        if own and None in own and not images:
            raise RejectError("placeholder_count", "an image part names no image, and the record has none")
        if role == "user":
            # One more than there are images is enough to see that there are too many placeholders.
            places += own if own is not None else [None] * min(text.count(PLACEHOLDER), len(images) + 1)
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else None
    if turns and turns[0][0] == "assistant":
        turns.pop(0)
    roles = [role for role, _ in turns]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise RejectError("turn_order", f"{len(roles)} turns do not alternate between question and answer")
    exchanges = [(turns[i][1], turns[i + 1][1]) for i in range(0, len(turns), 2)]
    _check_answers(exchanges)
    return Conversation(exchanges, _fill(places, images), system)


def _fill(places: list[ImageRef | None], images: list[ImageRef]) -> list[ImageRef]:
    """Fill the places without an image of their own with the images of the record."""
    if places.count(None) != len(images):
        # Without places, they come first; otherwise the numbers differ, which the caller reports.
        return [*images, *(place for place in places if place is not None)]
    rest = iter(images)
    return [next(rest) if place is None else place for place in places]


def _read_message(message: dict[str, Any]) -> tuple[str, str, list[ImageRef | None] | None]:
    """Return role and text, and the images if the content is a list of parts."""
    role_field, text_field = (
        ("role", "content") if _has(message, "role") and not _has(message, "from") else ("from", "value")
    )
    name = field(message, role_field, str)
    if name not in _ROLES:
        raise RejectError("turn_order", f"a turn is from {name[:50]!r}, not from human or gpt")
    content = field(message, text_field, (str, list) if text_field == "content" else str)
    if isinstance(content, str):
        return _ROLES[name], content, None
    texts, images = [], []
    for part in content:
        if not isinstance(part, dict):
            raise RejectError("json_type", "content has a part that is not an object")
        kind = field(part, "type", str)
        if kind == "text":
            # Images are parts here, so a placeholder is ordinary text.
            texts.append(field(part, "text", str).replace(PLACEHOLDER, PLACEHOLDER.upper()))
        elif kind in ("image", "image_url"):
            texts.append(PLACEHOLDER)
            images.append(_part_image(part, kind))
        else:
            raise RejectError("content_type", f"content has a part of type {kind[:50]!r}, not text or image")
    if images and _ROLES[name] != "user":
        raise RejectError("turn_order", f"an image is in a turn of the {_ROLES[name]}")
    return _ROLES[name], "\n".join(texts), images


def _part_image(part: dict[str, Any], kind: str) -> ImageRef | None:
    """Return the image that a part names; None for the next image in the list of the record."""
    value = part.get(kind)
    if isinstance(value, dict) and value.get("url") is not None:
        value = value["url"]
    return None if value is None else read_ref(value, kind)
