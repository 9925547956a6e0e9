"""Samples in tars: the files whose names share a key."""

from collections.abc import Callable, Iterator
from typing import Any

from megatron_vlm.config.prepare import TextRules
from megatron_vlm.data.documents import Document
from megatron_vlm.data.files.locations import Location
from megatron_vlm.data.files.records import parse_record
from megatron_vlm.data.files.tars import Member, TarReader, group_members, list_members
from megatron_vlm.data.rejects import RejectError
from megatron_vlm.data.sources.source import Found


class TarSample:
    """The files of one key, by extension.

    Raises:
        RejectError: a name occurs twice.
    """

    def __init__(self, tar: TarReader, key: str, group: dict[str, Member | None]) -> None:
        self.tar, self.key = tar, key
        self.files: dict[str, Member] = {}
        for extension, member in group.items():
            if member is None:
                raise RejectError("duplicate_name", f"the tar has {key[:200]}.{extension} twice")
            self.files[extension] = member

    def read_text(self, member: Member, rules: TextRules) -> str:
        """Return a text file; RejectError if it is too long or not UTF-8."""
        try:
            return self.tar.read(member, 4 * rules.max_characters, "text_too_long").decode()
        except UnicodeDecodeError as error:
            raise RejectError("invalid_utf8", f"byte {error.start} of {member.name[:200]}") from None

    def read_record(self, max_bytes: int) -> dict[str, Any] | None:
        """Return the .json file, None if there is none; RejectError if it is too long or damaged."""
        member = self.files.get("json")
        return parse_record(self.tar.read(member, max_bytes, "record_too_long")) if member else None


def read_samples(path: Location, make: Callable[[TarSample], Document]) -> Iterator[Found]:
    """Yield the document of each key, then the damage of the tar, if any; `make` may raise RejectError."""
    with TarReader(path) as tar:
        members, damage = list_members(tar)
        for key, group in group_members(iter(members)).items():
            try:
                yield Found(None, key, make(TarSample(tar, key, group)))
            except RejectError as error:
                yield Found(None, key, error)
    if damage is not None:
        yield Found(None, None, damage)
