"""Parquet tables of image-text pairs, joined with tars by URL or key."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from megatron_vlm.config import DataError
from megatron_vlm.data.files.join_index import JoinIndex, JoinRows, hash_texts
from megatron_vlm.data.files.locations import Location, is_file
from megatron_vlm.data.files.parquet import open_parquet
from megatron_vlm.data.rejects import RejectError

_URL_COLUMNS = ("url", "URL")
_CAPTION_COLUMNS = ("text", "caption", "TEXT", "top_caption")
_SHARD_COLUMNS = ("key", "url", "caption", "status", "error_message")
_BATCH_ROWS = 1 << 16


def read_shard_table(path: Location) -> dict[str, dict[str, Any]]:
    """Return the rows of the table that img2dataset writes beside a tar, by key; nothing if there is none."""
    if not is_shard_table(path):
        return {}
    with open_parquet(path) as table:
        columns = [name for name in _SHARD_COLUMNS if name in table.schema_arrow.names]
        return {str(row["key"]): row for row in table.read(columns=columns).to_pylist()}


def is_shard_table(path: Location) -> bool:
    """Tell whether a parquet file is the one that img2dataset writes beside the tar of the same name."""
    if not is_file(path) or not is_file(beside(path, ".tar")):
        return False
    with open_parquet(path) as table:
        return "key" in table.schema_arrow.names


def beside(path: Location, suffix: str) -> Location:
    """Return the file of the same name with another suffix, in capitals where that of `path` is."""
    return path.with_suffix(suffix.upper() if path.suffix.isupper() else suffix)


def index_table(path: Location, first_row: int) -> JoinRows:
    """List the rows of one table under their URLs; rows without one are under none.

    Args:
        path: a parquet file with a column of URLs.
        first_row: number of its first row among the rows of all tables.
    """
    hashes, rows = [np.zeros(0, dtype="<u8")], [np.zeros(0, dtype="<u8")]
    for urls in _batches(path, _URL_COLUMNS):
        named = [number for number, url in enumerate(urls) if url and isinstance(url, str)]
        hashes.append(hash_texts([urls[number] for number in named]))
        rows.append(np.array(named, dtype="<u8") + np.uint64(first_row))
        first_row += len(urls)
    return JoinRows(np.concatenate(hashes), np.concatenate(rows))


@dataclass(frozen=True, slots=True)
class TableFile:
    """A parquet file and its number of rows."""

    path: Location
    num_rows: int

    @classmethod
    def open(cls, path: Location) -> "TableFile":
        """Look at a file.

        Raises:
            DataError: the file is not parquet.
        """
        with open_parquet(path) as table:
            return cls(path, table.metadata.num_rows)


class PairTable:
    """Several parquet tables as one, found by URL.

    Args:
        files: the tables, in the order they were indexed in.
        index: folder of the join index.
    """

    def __init__(self, files: tuple[TableFile, ...], index: Path) -> None:
        self._files, self._index = files, JoinIndex(index)
        self._starts = [0, *accumulate(file.num_rows for file in files)]
        self._group: tuple[int, int, list[Any], list[Any]] = (0, 0, [], [])  # rows at hand: first, end, URLs, captions

    def find(self, url: str) -> list[int]:
        """Return the rows with this URL."""
        return [int(row) for row in self._index.find(url)]

    def caption(self, row: int, url: str) -> str | None:
        """Return the caption of a row.

        Raises:
            RejectError: the row has another URL, which two URLs with one hash would cause.
        """
        first, end, urls, captions = self._group
        if not first <= row < end:
            first, end, urls, captions = self._group = self._read_group(row)
        if urls[row - first] != url:
            raise RejectError("not_selected", f"row {row} has another URL")
        return captions[row - first]

    def _read_group(self, row: int) -> tuple[int, int, list[Any], list[Any]]:
        number = bisect_right(self._starts, row) - 1
        path = self._files[number].path
        with open_parquet(path) as table:
            names = [_column(table, path, _URL_COLUMNS), _column(table, path, _CAPTION_COLUMNS)]
            first = self._starts[number]
            for group in range(table.num_row_groups):
                end = first + table.metadata.row_group(group).num_rows
                if row < end:
                    content = table.read_row_group(group, columns=names)
                    return first, end, *(content.column(name).to_pylist() for name in names)
                first = end
        raise DataError(f"table has fewer rows than when it was indexed: {row} is not there", where=str(path))


def unused_rows(files: tuple[TableFile, ...], used: np.ndarray) -> Iterator[tuple[Location, int, str | None]]:
    """Yield file, row number in it from 1, and URL of the rows of all tables that are not in `used`, bool[rows]."""
    start = 0
    for file in files:
        first = start
        for urls in _batches(file.path, _URL_COLUMNS):
            for row in np.flatnonzero(~used[first : first + len(urls)]).tolist():
                yield file.path, first - start + row + 1, urls[row]
            first += len(urls)
        start += file.num_rows


def _batches(path: Location, names: tuple[str, ...]) -> Iterator[list[Any]]:
    with open_parquet(path) as table:
        column = _column(table, path, names)
        for batch in table.iter_batches(_BATCH_ROWS, columns=[column]):
            yield batch.column(0).to_pylist()


def _column(table: pyarrow.parquet.ParquetFile, path: Location, names: tuple[str, ...]) -> str:
    found = next((name for name in names if name in table.schema_arrow.names), None)
    if found is None:
        raise DataError(
            f"parquet file has no column {' or '.join(names)}",
            where=str(path),
            fix="rename the column, or leave the file out of the input folder",
        )
    return found
