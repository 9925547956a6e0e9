"""The interface of all readers of raw corpora."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

from megatron_vlm.config.prepare import TextRules
from megatron_vlm.data.documents import Document
from megatron_vlm.data.files.locations import Location
from megatron_vlm.data.files.records import Record
from megatron_vlm.data.rejects import RejectError
from megatron_vlm.data.sources.image_store import ImageReader
from megatron_vlm.data.text.tokenizer import Tokenizer


class Found(NamedTuple):
    """One document of an input file, or why it is rejected."""

    line: int | None
    key: str | None
    document: Document | RejectError


class SourceModule(Protocol):
    """The function that the module of every kind of corpus offers, `data/sources/<kind>`."""

    def find_source(self, paths: tuple[Location, ...], options: Any, tokenizer: Tokenizer) -> "Source":
        """Return the reader for the files in `paths`.

        Args:
            paths: files, folders or patterns that the user named.
            options: `Options` of `config/sources/<kind>`.
            tokenizer: the tokenizer of the dataset, which a template may not fit.

        Raises:
            ConfigError: the input does not exist or is of another kind, or an option does not fit it.
            DataError: the input is damaged.
        """


class Source(Protocol):
    """A corpus: its files, and how to read one of them. Picklable; each worker gets a copy."""

    @property
    def inputs(self) -> tuple[Location, ...]:
        """The files, in the order of the shards; each is read on its own."""

    def read(self, path: Location, images: ImageReader) -> Iterator[Found]:
        """Yield every document of one file, including rejected ones."""


def read_each(
    records: Iterable[Record],
    find_key: Callable[[dict[str, Any]], str | None],
    make: Callable[[dict[str, Any], str], Document],
) -> Iterator[Found]:
    """Yield the document of each record; a record that is damaged or rejected affects no other.

    Args:
        records: the records of one file.
        find_key: returns the name of a record in its corpus.
        make: returns the document of a record and its key ("" if it has none), or raises RejectError.
    """
    for line, value in records:
        key = None
        try:
            if isinstance(value, RejectError):
                raise value
            key = find_key(value)
            yield Found(line, key, make(value, key or ""))
        except RejectError as error:
            yield Found(line, key, error)


def check_length(num_characters: int, rules: TextRules) -> None:
    """Raise a RejectError if all texts of a document together are too long."""
    if num_characters > rules.max_characters:
        raise RejectError("text_too_long", f"more than {rules.max_characters} characters")


def key_of(value: object) -> str | None:
    """Return the key of a record as text, shortened for the list of rejects."""
    return str(value)[:300] if isinstance(value, (str, int)) else None
