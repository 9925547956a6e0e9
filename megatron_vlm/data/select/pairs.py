"""Select the image-text pairs with the highest score from any number of parquet files, in bounded memory.

Two passes: the first reads only the score columns and keeps the k best rows so far, the second copies the selected rows
with all their columns. Source: VILA, appendix D, ranks COYO-700M by CLIP similarity and keeps 25M.
"""

import dataclasses
import json
import logging
import math
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from tqdm import tqdm

from megatron_vlm.config import ConfigError, DataError, UsageError
from megatron_vlm.data.files.locations import Location, place_of
from megatron_vlm.data.files.parquet import open_parquet, unreadable
from megatron_vlm.data.rejects import describe_rejects
from megatron_vlm.data.select.histogram import ScoreHistogram, histogram_rows, save_histogram
from megatron_vlm.data.select.top_rows import TopRows
from megatron_vlm.platform.files.durable import folder_beside, storage_errors, write_durably

logger = logging.getLogger(__name__)

# The underscore: readers of a folder of parquet files (Arrow, Spark, pandas) skip such names.
REPORT_FILE, PICTURE_FILE = "_report.json", "_scores.png"
_BATCH_ROWS = 1 << 16
_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9}


def parse_count(text: str) -> int:
    """Return a count written as 25000000, 25M, 2.5M, 400K or 1B.

    Raises:
        ValueError: the text has another form, or is not a whole number above 0.
    """
    unit = _UNITS.get(text[-1:].upper())
    value = Fraction(text[:-1] if unit else text) * (unit or 1)
    if value.denominator != 1 or value <= 0:
        raise ValueError(f"{text} is not a whole number above 0")
    return int(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectRules:
    """Which rows are kept: those with the highest score; of equal scores, those that come first.

    The order is that of the files, by name within a folder, and of the rows in a file.

    Raises:
        UsageError: not exactly one of `top` and `fraction` is given, no column is, or the fraction is not in 0 to 1.
    """

    columns: tuple[str, ...]
    """Their sum is the score."""
    top: int | None = None
    """Number of rows kept from all files together."""
    fraction: Fraction | None = None
    """Fraction of its rows that each file keeps, rounded down, as VILA's scripts do with 1/5."""
    min_score: float | None = None
    """Rows whose score is not above this are dropped first."""

    def __post_init__(self) -> None:
        if not self.columns or not all(self.columns):
            raise UsageError("--by names no column, or an empty one", fix="name columns, joined by +")
        if (self.top is None) == (self.fraction is None):
            raise UsageError("give either --top or --fraction", fix="--top 25M is the paper's")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            what = f"--fraction {float(self.fraction)} is not above 0 and up to 1"
            raise UsageError(what, fix="use 0.2, for example")


@dataclass(frozen=True, slots=True)
class _InputFile:
    path: Location
    output: str
    first_row: int
    num_rows: int


def select_pairs(inputs: tuple[Location, ...], output: Path, rules: SelectRules) -> dict[str, Any]:
    """Write the selected rows as parquet files, one for each input file with selected rows, and a report.

    Args:
        inputs: parquet files; their order decides among equal scores.
        output: new folder for parquet files with all columns of the input, in its order; `_report.json`, `_scores.png`.
        rules: what is selected.

    Returns:
        The report: rows = kept + dropped by reason, the lowest score that was kept, counts by file, a histogram.

    Raises:
        ConfigError: the output folder is not empty or another process writes it, or a file is given twice.
        DataError: a file cannot be read, lacks a score column, or no row is left.
        StorageError: the output cannot be written.
    """
    # Locked from the start, so that a second command does not work in vain.
    with storage_errors("selection cannot be written", output), folder_beside(output, is_new=True) as unfinished:
        return _select(inputs, unfinished, rules)


def _select(inputs: tuple[Location, ...], folder: Path, rules: SelectRules) -> dict[str, Any]:
    files = _list_files(inputs)
    for file in files:
        _check_columns(file.path, rules.columns)
    dropped: Counter[str] = Counter()
    everything = ScoreHistogram()
    scores, rows = _choose(files, rules, dropped, everything)
    if not len(rows):
        raise DataError(
            f"none of {sum(file.num_rows for file in files)} rows are left: {describe_rejects(dropped)}",
            where=", ".join(rules.columns),
            fix=f"lower --min-score, {'raise --fraction, ' if rules.fraction is not None else ''}or name other columns "
            "in --by",
        )
    if rules.top is not None and len(rows) < rules.top:
        logger.warning("only %d rows have a usable score, fewer than the %d wanted; all are kept", len(rows), rules.top)
    kept = ScoreHistogram(everything.width)
    kept.add(scores)
    report = _report(files, rules, scores, dropped, _write_files(files, rows, folder)) | {
        "histogram": histogram_rows(everything, kept),
        "bin_width": everything.width,
    }
    title = f"{'+'.join(rules.columns)}: {report['kept']} of {report['rows']} rows kept"
    save_histogram(title, report["histogram"], everything.width, folder / PICTURE_FILE)
    write_durably(folder / REPORT_FILE, (json.dumps(report, indent=1) + "\n").encode())
    return report


def _list_files(inputs: tuple[Location, ...]) -> list[_InputFile]:
    resolved = [place_of(path) for path in inputs]
    if len(set(resolved)) < len(resolved):
        twice = next(path for path, count in Counter(resolved).items() if count > 1)
        raise ConfigError("input file is given twice", where=str(twice), fix="give each file once")
    names = [path.name for path in inputs]
    unique = len(set(names)) == len(names)
    files: list[_InputFile] = []
    first = 0
    for number, path in enumerate(inputs):
        with open_parquet(path, streamed=True) as table:
            num_rows = table.metadata.num_rows
        files.append(_InputFile(path, path.name if unique else f"{number:05d}-{path.name}", first, num_rows))
        first += num_rows
    return files


def _check_columns(path: Location, columns: tuple[str, ...]) -> None:
    with open_parquet(path, streamed=True) as table:
        schema = table.schema_arrow
    types = pyarrow.types
    numbers = [field.name for field in schema if types.is_floating(field.type) or types.is_integer(field.type)]
    for name in columns:
        if name not in schema.names:
            # Most scores are floats.
            numbers.sort(key=lambda number: types.is_integer(schema.field(number).type))
            raise DataError(
                f"parquet file has no column {name}",
                where=str(path),
                fix=f"use --by with {textwrap.shorten(', '.join(numbers), 120, placeholder=' ...') or 'other files'}",
            )
        kind = schema.field(name).type
        if name not in numbers:
            raise DataError(f"column {name} is of type {kind}, not a number", where=str(path), fix="use another --by")


def _choose(
    files: list[_InputFile], rules: SelectRules, dropped: Counter[str], histogram: ScoreHistogram
) -> tuple[np.ndarray, np.ndarray]:
    """Return the kept scores and row numbers (counted over all files), by row number."""
    chosen: list[tuple[np.ndarray, np.ndarray]] = []
    best = TopRows(rules.top) if rules.top is not None else None
    with tqdm(total=sum(file.num_rows for file in files), unit=" rows", unit_scale=True, disable=None) as bar:
        for file in files:
            wanted = 0
            if rules.fraction is not None:
                wanted = math.floor(rules.fraction * file.num_rows)
                best = TopRows(wanted) if wanted else None
            usable = 0
            for scores, rows in _read_scores(file, rules.columns, dropped):
                bar.update(min(_BATCH_ROWS, file.first_row + file.num_rows - bar.n))
                histogram.add(scores)
                if rules.min_score is not None:
                    above = scores > rules.min_score
                    dropped["min_score"] += len(scores) - int(above.sum())
                    scores, rows = scores[above], rows[above]
                usable += len(scores)
                if best is not None:
                    best.add(scores, rows)
            if rules.fraction is not None:
                if usable < wanted:
                    logger.warning("%s has %d usable rows, fewer than the %d wanted", file.path, usable, wanted)
                if best is not None:
                    chosen.append(best.result())
    if rules.top is not None and best is not None:
        chosen.append(best.result())
    scores, rows = (np.concatenate(found) for found in zip(*chosen, strict=True)) if chosen else (np.zeros(0),) * 2
    dropped["score_too_low"] = sum(file.num_rows for file in files) - len(rows) - dropped.total()
    return scores, rows


def _read_scores(
    file: _InputFile, columns: tuple[str, ...], dropped: Counter[str]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield scores and row numbers of the rows that have a score, batch by batch; count the others."""
    first = file.first_row
    for batch in _batches(file.path, columns=sorted(set(columns))):
        score = np.zeros(batch.num_rows)
        missing = np.zeros(batch.num_rows, dtype=bool)
        for name in columns:
            column = batch.column(name)
            missing |= column.is_null().to_numpy(zero_copy_only=False)
            score += column.cast(pyarrow.float64(), safe=False).to_numpy(zero_copy_only=False)
        finite = np.isfinite(score)
        dropped["score_missing"] += int(missing.sum())
        dropped["score_not_finite"] += int((~finite & ~missing).sum())
        usable = finite & ~missing
        yield score[usable], first + np.flatnonzero(usable)
        first += batch.num_rows
    _check_num_rows(file, first - file.first_row)


def _write_files(files: list[_InputFile], rows: np.ndarray, folder: Path) -> list[int]:
    """Copy the selected rows and return their number for each file."""
    borders = np.searchsorted(rows, [*(file.first_row for file in files), files[-1].first_row + files[-1].num_rows])
    counts = np.diff(borders).tolist()
    with tqdm(total=len(rows), unit=" rows written", unit_scale=True, disable=None) as bar:
        for file, start, count in zip(files, borders.tolist(), counts, strict=False):
            if count:
                _write_file(file, rows[start : start + count] - file.first_row, folder / file.output, bar)
    return counts


def _write_file(file: _InputFile, rows: np.ndarray, path: Path, bar: tqdm) -> None:
    """Copy rows of one file, int64[n] and ascending; row groups without selected rows are not read."""
    waiting: list[pyarrow.RecordBatch] = []
    num_waiting = first = 0
    with open_parquet(file.path, streamed=True) as table:
        schema = table.schema_arrow
        sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
    groups, places = _place_in_groups(rows, sizes)
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for batch in _batches(file.path, row_groups=groups):
            start, end = np.searchsorted(places, [first, first + batch.num_rows])
            if end > start:
                waiting.append(batch.take(pyarrow.array(places[start:end] - first)))
                num_waiting += int(end - start)
            first += batch.num_rows
            if num_waiting >= _BATCH_ROWS:
                writer.write_table(pyarrow.Table.from_batches(waiting, schema))
                bar.update(num_waiting)
                waiting, num_waiting = [], 0
        if waiting:
            writer.write_table(pyarrow.Table.from_batches(waiting, schema))
            bar.update(num_waiting)
    _check_num_rows(dataclasses.replace(file, num_rows=sum(sizes[group] for group in groups)), first)


def _place_in_groups(rows: np.ndarray, sizes: list[int]) -> tuple[list[int], np.ndarray]:
    """Return the row groups that contain the rows, and the positions of the rows if only these groups are read."""
    borders = np.cumsum([0, *sizes])
    owner = np.searchsorted(borders, rows, side="right") - 1
    groups, position = np.unique(owner, return_inverse=True)
    starts = np.cumsum([0, *(sizes[group] for group in groups)])
    return groups.tolist(), rows - borders[owner] + starts[position]


def _report(
    files: list[_InputFile], rules: SelectRules, scores: np.ndarray, dropped: Counter[str], written: list[int]
) -> dict[str, Any]:
    return {
        "by": "+".join(rules.columns),
        "top": rules.top,
        "fraction": None if rules.fraction is None else float(rules.fraction),
        "min_score": rules.min_score,
        "rows": sum(file.num_rows for file in files),
        "kept": len(scores),
        "dropped": {reason: count for reason, count in sorted(dropped.items()) if count},
        "lowest_kept_score": float(scores.min()),
        "mean_kept_score": float(scores.mean()),
        "highest_score": float(scores.max()),
        "files": [
            {"input": file.path.name, "rows": file.num_rows, "kept": count, "output": file.output if count else None}
            for file, count in zip(files, written, strict=True)
        ],
    }


def _check_num_rows(file: _InputFile, found: int) -> None:
    if found != file.num_rows:
        what = f"{found} rows were read, {file.num_rows} are expected; the file has changed meanwhile"
        raise DataError(what, where=str(file.path), fix="run the same command again")


def _batches(path: Location, **choice: Any) -> Iterator[pyarrow.RecordBatch]:
    with open_parquet(path, streamed=True) as table:
        try:
            yield from table.iter_batches(_BATCH_ROWS, **choice)
        except (pyarrow.ArrowException, OSError) as error:
            raise unreadable(path, error) from None
