"""Text without images: FLAN-like questions and answers, and running text."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlm.data.documents import Control, Document, RejectError, Special, Text, clean_text
from megatron_vlm.data.sources.conversations import ConversationRules
from megatron_vlm.data.sources.records import field, read_records
from megatron_vlm.data.sources.source import Found, ReadContext, key_of
from megatron_vlm.data.templates import Turn, find_template, render_conversation


@dataclass(frozen=True, slots=True)
class TextSource:
    """JSON lines of `inputs` and `targets`, or of `text`.

    The former are a question and its answer in a conversation template; the latter is trained as it is, with BOS and
    EOS. VILA's code gives FLAN no system prompt.
    """

    inputs: tuple[Path, ...]
    rules: ConversationRules = ConversationRules(system="none")

    def read(self, path: Path, context: ReadContext) -> Iterator[Found]:
        """Yield the documents of one file."""
        for line, value in read_records(path, max_bytes=self.rules.max_record_bytes):
            if isinstance(value, RejectError):
                yield Found(line, None, value)
                continue
            key = key_of(value.get("id"))
            try:
                yield Found(line, key, self._document(value))
            except RejectError as error:
                yield Found(line, key, error)

    def _document(self, record: dict[str, Any]) -> Document:
        if "text" in record:
            text = clean_text(field(record, "text", str), self.rules.text)
            return Document((Special(Control.BOS), Text(text), Special(Control.EOS)))
        question = clean_text(field(record, "inputs", str), self.rules.text)
        answer = clean_text(field(record, "targets", str), self.rules.text)
        if not answer.strip():
            raise RejectError("empty_text", "targets is empty")
        template = find_template(self.rules.template)
        return render_conversation([Turn((Text(question),), answer)], template, self.rules.system_text)
