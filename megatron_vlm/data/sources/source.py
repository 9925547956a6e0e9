"""What every reader of a raw corpus has in common."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from megatron_vlm.config import ConfigError
from megatron_vlm.data.documents import Document, RejectError
from megatron_vlm.data.files.locations import Location, check_suffixes, list_location
from megatron_vlm.data.files.records import SUFFIXES
from megatron_vlm.data.sources.image_store import ImageReader

RECORD_SUFFIXES = ".jsonl, .ndjson, .json, each also with .gz or .zip"


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


class Source(Protocol):
    """A corpus: which files it has, and how one of them is read. Picklable; workers get a copy."""

    @property
    def inputs(self) -> tuple[Location, ...]:
        """The files, each read on its own; in the order of the shards."""

    def read(self, path: Location, context: ReadContext) -> Iterator[Found]:
        """Yield every document of one file, those that are rejected too."""


def find_record_files(paths: tuple[Location, ...]) -> tuple[Location, ...]:
    """Return the JSON files among `paths` and directly inside of the folders among them, by name.

    Raises:
        ConfigError: a path does not exist, or there is no such file.
    """
    return find_files(paths, SUFFIXES, f"JSON or JSON-lines files ({RECORD_SUFFIXES})")


def find_files(paths: tuple[Location, ...], suffixes: tuple[str, ...], what: str) -> tuple[Location, ...]:
    """Return the files with one of `suffixes` among `paths` and directly inside of the folders among them, by name.

    Raises:
        ConfigError: a path does not exist, there is no such file, or one is named that is of another kind; `what` names
            the kind.
    """
    listed = list_inputs(paths, suffixes)
    files = tuple(file for path in paths for file in listed[path])
    check_suffixes(files, suffixes)
    check_each_used(listed, files, what)
    return files


def list_inputs(paths: Sequence[Location], suffixes: tuple[str, ...]) -> dict[Location, list[Location]]:
    """Return for each path the file itself, or the files with one of `suffixes` directly inside of it.

    Raises:
        ConfigError: a path does not exist.
    """
    return {path: list_location(path, suffixes) for path in paths}


def check_each_used(listed: Mapping[Location, Sequence[Location]], used: Collection[Location], what: str) -> None:
    """Refuse an input that nothing would be read of: it would be missing in the result without a word.

    Raises:
        ConfigError: a path has none of the files that are used; `what` names their kind.
    """
    used = set(used)
    for path, files in listed.items():
        if not any(file in used for file in files):
            fix = "check --input" if len(listed) == 1 else "leave it out; prepare each kind of input on its own"
            raise ConfigError(f"input has no {what}", where=str(path), fix=fix)


def key_of(value: object) -> str | None:
    """Return the key of a record as text, cut to a length that fits a list of rejects."""
    return str(value)[:300] if isinstance(value, (str, int)) else None
