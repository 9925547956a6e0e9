"""Records from parquet: each row is a record, like a line of JSON."""

from collections.abc import Iterator
from typing import Any

from megatron_vlm.config import DataError
from megatron_vlm.config.prepare import MAX_RECORD_BYTES
from megatron_vlm.data.files.inputs import is_table
from megatron_vlm.data.files.locations import Location
from megatron_vlm.data.files.parquet import open_parquet, read_rows
from megatron_vlm.data.files.records import Record, read_records, too_long
from megatron_vlm.data.rejects import RejectError


def read_any_records(path: Location, *, max_bytes: int = MAX_RECORD_BYTES) -> Iterator[Record]:
    """Read the records of a JSON or parquet file; its name tells which."""
    if is_table(path):
        return read_table_records(path, max_bytes=max_bytes)
    return read_records(path, max_bytes=max_bytes)


def read_table_records(path: Location, *, max_bytes: int = MAX_RECORD_BYTES) -> Iterator[Record]:
    """Read the rows of a parquet file, a few at a time; one with texts and bytes of over `max_bytes` is rejected.

    Yields:
        A record whose line is the number of the row, from 1, without empty cells; or a RejectError with reason
        record_too_long, or one of those that `read_rows` yields.
    """
    try:
        with open_parquet(path, streamed=True) as table:
            for number, cells in read_rows(table):
                yield Record(number, cells if isinstance(cells, RejectError) else _record(cells, max_bytes))
    except DataError as error:
        yield Record(1, RejectError("file_truncated", error.what))


def _record(cells: dict[str, Any], max_bytes: int) -> dict[str, Any] | RejectError:
    value = {name: cell for name, cell in cells.items() if cell is not None}
    size = _num_bytes(value)
    return too_long(size, max_bytes) if size > max_bytes else value


def _num_bytes(value: Any) -> int:
    """Return the total length of all texts and bytes in a value."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_num_bytes, value.values()))
    return sum(map(_num_bytes, value)) if isinstance(value, list) else 0
