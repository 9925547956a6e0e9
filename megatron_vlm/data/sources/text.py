"""The kind `text`: FLAN-like questions and answers, conversations and plain text, without images."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_vlm.config.prepare import ConversationRules
from megatron_vlm.config.sources.text import Options
from megatron_vlm.data.documents import Control, Document, Special, Text, clean_text
from megatron_vlm.data.files.inputs import find_instruction_files
from megatron_vlm.data.files.locations import Location
from megatron_vlm.data.files.records import field
from megatron_vlm.data.files.table_records import read_any_records
from megatron_vlm.data.rejects import RejectError
from megatron_vlm.data.sources.image_store import ImageReader
from megatron_vlm.data.sources.instructions.conversations import render
from megatron_vlm.data.sources.instructions.records import has_form, read_conversation
from megatron_vlm.data.sources.source import Found, check_length, key_of, read_each
from megatron_vlm.data.text.templates import Turn, check_template, find_template
from megatron_vlm.data.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextSource:
    """JSON, JSON lines or parquet with `text`, or in any form that `read_conversation` knows, such as FLAN's.

    `text` is trained unchanged, with BOS and EOS; the other forms are conversations in a template. A record with both,
    such as Alpaca's, whose `text` is the conversation in another template, is a conversation. VILA's code gives FLAN no
    system prompt. Records with images are rejected.
    """

    inputs: tuple[Location, ...]
    rules: ConversationRules = Options().rules

    def read(self, path: Location, images: ImageReader) -> Iterator[Found]:
        """Yield the documents of one file."""
        return read_each(
            read_any_records(path, max_bytes=self.rules.max_record_bytes),
            lambda record: key_of(record.get("id")),
            lambda record, _: self._document(record),
        )

    def _document(self, record: dict[str, Any]) -> Document:
        rules = self.rules.text
        if record.get("text") is not None and not has_form(record):
            text = clean_text(field(record, "text", str), rules)
            return Document((Special(Control.BOS), Text(text), Special(Control.EOS)))
        conversation = read_conversation(record)
        if count := len(conversation.images):
            raise RejectError("images_in_text", f"{count} images; use `prepare conversations`")
        turns = [
            Turn((Text(clean_text(question, rules)),), clean_text(answer, rules))
            for question, answer in conversation.exchanges
        ]
        if len(turns) > 1:
            check_length(conversation.num_characters, rules)
        return render(conversation, turns, self.rules)


def find_source(paths: tuple[Location, ...], options: Options, tokenizer: Tokenizer) -> TextSource:
    """Return the reader of the files; ConfigError if the tokenizer does not fit the template, or a path is missing."""
    check_template(find_template(options.rules.template), tokenizer)
    return TextSource(find_instruction_files(paths), options.rules)
