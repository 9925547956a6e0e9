"""Instruction data with images: conversations in a template."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from megatron_vlm.config.prepare import ConversationRules
from megatron_vlm.data.documents import PLACEHOLDER, Document, Image, clean_text
from megatron_vlm.data.files.locations import Location
from megatron_vlm.data.files.table_records import read_any_records
from megatron_vlm.data.rejects import RejectError
from megatron_vlm.data.sources.image_store import ImageReader
from megatron_vlm.data.sources.instructions.records import Conversation, read_conversation
from megatron_vlm.data.sources.source import Found, check_length, key_of, read_each
from megatron_vlm.data.text.templates import Turn, find_system, find_template, render_conversation, split_placeholders


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


def make_document(conversation: Conversation, images: ImageReader, rules: ConversationRules) -> Document:
    """Render a conversation with its images in the template.

    Raises:
        RejectError: its text or an image is not accepted, or the numbers of placeholders and images differ.
    """
    exchanges, refs = list(conversation.exchanges), conversation.images
    check_length(conversation.num_characters, rules.text)
    counts = [question.count(PLACEHOLDER) for question, _ in exchanges]
    if refs and not any(counts):
        counts[0] = len(refs)
        exchanges[0] = (f"{PLACEHOLDER}\n" * len(refs) + exchanges[0][0], exchanges[0][1])
    if sum(counts) != len(refs):
        raise RejectError("placeholder_count", f"{sum(counts)} placeholders for {len(refs)} images")
    found = iter([ref.load(images) for ref in refs])
    turns = [
        _make_turn(question, answer, list(islice(found, count)), rules)
        for (question, answer), count in zip(exchanges, counts, strict=True)
    ]
    return render(conversation, turns, rules)


def render(conversation: Conversation, turns: list[Turn], rules: ConversationRules) -> Document:
    """Render turns in the template, with the system prompt of the conversation, else of the rules or the template."""
    system: object = conversation.system
    if system is None:
        system = find_system("default" if rules.system is None else rules.system)
    return render_conversation(turns, find_template(rules.template), system)


def _make_turn(question: str, answer: str, images: list[Image], rules: ConversationRules) -> Turn:
    if rules.image_position == "front" and images:
        question = f"{PLACEHOLDER}\n" * len(images) + question.replace(PLACEHOLDER, "").strip()
    for chunk in question.split(PLACEHOLDER):
        clean_text(chunk, rules.text)
    return Turn(split_placeholders(question, images), clean_text(answer, rules.text))
