"""Parquet files, local or at a URL, read row by row in bounded memory; damage affects only its row group."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_vlm.config import DataError
from megatron_vlm.data.files.locations import Location
from megatron_vlm.data.files.records import Record
from megatron_vlm.data.rejects import RejectError

DAMAGE = (pyarrow.ArrowException, OSError, ValueError)
"""Errors of pyarrow for a damaged file; ValueError: a name is not UTF-8."""
_BUFFER_BYTES = 1 << 20
_BATCH_BYTES, _MAX_BATCH_ROWS = 8 << 20, 4096


def open_parquet(path: Location, *, streamed: bool = False) -> pyarrow.parquet.ParquetFile:
    """Open a parquet file.

    Args:
        path: the file.
        streamed: read columns a MiB at a time instead of whole row groups, which are often hundreds of MiB for
            columns of images.

    Raises:
        DataError: the file is not parquet.
        StorageError: it is at a URL and cannot be read.
    """
    # With pread: a mapped file that is truncated while it is read kills the process.
    options = {"memory_map": False} | ({"buffer_size": _BUFFER_BYTES, "pre_buffer": False} if streamed else {})
    try:
        table = pyarrow.parquet.ParquetFile(path if isinstance(path, Path) else path.open("rb"), **options)
        table.schema_arrow  # noqa: B018 - finds damage in the schema
        return table
    except DAMAGE as error:
        raise unreadable(path, error) from None


def unreadable(path: Location, error: Exception) -> DataError:
    """Return the error for a damaged parquet file."""
    return DataError(
        f"parquet file cannot be read: {' '.join(str(error).split())[:120]}", where=str(path), fix="copy it again"
    )


def read_rows(table: pyarrow.parquet.ParquetFile, columns: Sequence[str] | None = None) -> Iterator[Record]:
    """Read the rows, a few MiB at a time; at least a page of each column is in memory.

    Args:
        table: opened with `streamed`.
        columns: the columns to read; None: all.

    Yields:
        A row; or a RejectError with reason invalid_utf8 for a row with such a text, and one with reason
        file_truncated for what is left of a row group from where it is damaged.
    """
    end = 0
    for group in range(table.num_row_groups):
        facts = table.metadata.row_group(group)
        number, end = end, end + facts.num_rows
        # Thousands of rows of text, or a few of images.
        num_rows = min(max(_BATCH_BYTES * facts.num_rows // max(facts.total_byte_size, 1), 1), _MAX_BATCH_ROWS)
        batches = table.iter_batches(num_rows, row_groups=[group], columns=columns)
        while number < end:
            try:
                batch = next(batches, None)
            except DAMAGE as error:
                detail = f"{end - number} rows: {' '.join(str(error).split())[:200]}"
                yield Record(number + 1, RejectError("file_truncated", detail))
                break
            if batch is None:
                yield Record(number + 1, RejectError("file_truncated", f"{end - number} rows are missing"))
                break
            for cells in _cells(batch):
                number += 1
                yield Record(number, cells)


def _cells(batch: pyarrow.RecordBatch) -> list[dict[str, Any] | RejectError]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [RejectError("invalid_utf8", f"byte {error.start} of a text")]
        return [cells for index in range(batch.num_rows) for cells in _cells(batch.slice(index, 1))]
