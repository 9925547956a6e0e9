"""Instruction data with images: conversations in a template."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_vlm.config.prepare import ConversationRules
from megatron_vlm.data.documents import PLACEHOLDER, Document, Image, clean_text
from megatron_vlm.data.files.locations import Location
from megatron_vlm.data.files.table_records import read_any_records
from megatron_vlm.data.rejects import RejectError
from megatron_vlm.data.sources.image_store import ImageReader
from megatron_vlm.data.sources.instructions.records import Conversation, read_conversation
from megatron_vlm.data.sources.source import Found, key_of, read_each
from megatron_vlm.data.text.templates import (
    Turn,
    find_system,
    find_template,
    render_conversation,
    split_placeholders,
)


@dataclass(frozen=True, slots=True)
class ConversationSource:
    """JSON, JSON lines or parquet in any form that `read_conversation` knows, such as LLaVA's.

    Only questions have placeholders. If a conversation has images but no placeholder, the images are put before its
    first question. If the assistant speaks first, that turn is dropped.

    Source: LLaVA, llava/train/train.py, preprocess_multimodal; VILA-1.5, llava/data/dataset.py.
    """

    inputs: tuple[Location, ...]
    rules: ConversationRules = ConversationRules()

    def read(self, path: Location, images: ImageReader) -> Iterator[Found]:
        """Yield the conversations of one file, rendered in the template."""
        return read_each(
            read_any_records(path, max_bytes=self.rules.max_record_bytes),
            lambda record: key_of(record.get("id")),
            lambda record, _: make_document(read_conversation(record), images, self.rules),
        )


def system_prompt(rules: ConversationRules) -> object:
    """Return the system prompt for `render_conversation`: the one in the rules, or the template's own."""
    return find_system("default" if rules.system is None else rules.system)


def make_document(conversation: Conversation, images: ImageReader, rules: ConversationRules) -> Document:
    """Render a conversation with its images in the template.

    Raises:
        RejectError: its text or an image is not accepted, or the numbers of placeholders and images differ.
    """
    exchanges, refs = list(conversation.exchanges), conversation.images
    if sum(len(text) for exchange in exchanges for text in exchange) > rules.text.max_characters:
        raise RejectError("text_too_long", f"more than {rules.text.max_characters} characters")
    counts = [question.count(PLACEHOLDER) for question, _ in exchanges]
    if refs and not any(counts):
        counts[0] = len(refs)
        exchanges[0] = (f"{PLACEHOLDER}\n" * len(refs) + exchanges[0][0], exchanges[0][1])
    if sum(counts) != len(refs):
        raise RejectError("placeholder_count", f"{sum(counts)} placeholders for {len(refs)} images")
    found = [ref.load(images) for ref in refs]
    turns = []
    for (question, answer), count in zip(exchanges, counts, strict=True):
        own, found = found[:count], found[count:]
        turns.append(_make_turn(question, answer, own, rules))
    system = system_prompt(rules) if conversation.system is None else conversation.system
    return render_conversation(turns, find_template(rules.template), system)


def _make_turn(question: str, answer: str, images: list[Image], rules: ConversationRules) -> Turn:
    if rules.image_position == "front" and images:
        question = f"{PLACEHOLDER}\n" * len(images) + question.replace(PLACEHOLDER, "").strip()
    for chunk in question.split(PLACEHOLDER):
        clean_text(chunk, rules.text)
    return Turn(split_placeholders(question, images), clean_text(answer, rules.text))
