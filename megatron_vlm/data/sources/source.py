"""What every reader of a raw corpus has in common."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from megatron_vlm.data.documents import Document
from megatron_vlm.data.files.locations import Location
from megatron_vlm.data.rejects import RejectError
from megatron_vlm.data.sources.image_store import ImageReader
from megatron_vlm.data.text.tokenizer import Tokenizer


class Found(NamedTuple):
    """One document of an input file, or why it is none."""

    line: int | None
    key: str | None
    document: Document | RejectError


@dataclass(slots=True)
class ReadContext:
    """What reading one input file uses and leaves behind."""

    images: ImageReader
    used_rows: list[int] = field(default_factory=list)
    """Rows of a joined table that a document was found for."""


class SourceModule(Protocol):
    """The function that every kind of corpus offers, as `data/sources/<kind>`."""

    def find_source(self, paths: tuple[Location, ...], options: Any, tokenizer: Tokenizer) -> "Source":
        """Return the reader of what `paths` have.

        Args:
            paths: files, folders or patterns that the user named.
            options: `Options` of `config/sources/<kind>`.
            tokenizer: the tokenizer of the dataset, which a template may not fit.

        Raises:
            ConfigError: the input does not exist or is of another kind, or an option does not fit it.
            DataError: the input is damaged.
        """


class Source(Protocol):
    """A corpus: which files it has, and how one of them is read. Picklable; workers get a copy."""

    @property
    def inputs(self) -> tuple[Location, ...]:
        """The files, each read on its own; in the order of the shards."""

    def read(self, path: Location, context: ReadContext) -> Iterator[Found]:
        """Yield every document of one file, those that are rejected too."""


def key_of(value: object) -> str | None:
    """Return the key of a record as text, cut to a length that fits a list of rejects."""
    return str(value)[:300] if isinstance(value, (str, int)) else None
