"""Select a given number of records from any number of text files, regardless of the order of files and workers.

Every record is hashed with the seed; the records with the smallest hashes of all files are kept. Two passes: the first
keeps at most the wanted number of hashes, the second copies the selected records unchanged. Source: VILA, section 3.3,
mixes 1M records of FLAN into the instruction data; its code takes every n-th record of the files in their order.
"""

import hashlib
import itertools
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from megatron_vlm.config import ConfigError, DataError, UsageError
from megatron_vlm.config.prepare import MAX_RECORD_BYTES
from megatron_vlm.data.files.inputs import TABLE_SUFFIX, is_table
from megatron_vlm.data.files.locations import Location, place_of
from megatron_vlm.data.files.records import SUFFIXES, parse_record, read_raw_records
from megatron_vlm.data.files.table_records import read_table_records
from megatron_vlm.data.rejects import RejectError, reject_row
from megatron_vlm.data.select.top_rows import TopRows
from megatron_vlm.data.tasks.processes import Report, run_tasks
from megatron_vlm.platform.files.durable import flush_to_disk, folder_beside, storage_errors, write_durably

logger = logging.getLogger(__name__)

# In a folder of its own, since `prepare` reads the .json files directly inside its input.
REPORT_FILE, REJECTS_FILE = Path("_report", "select.json"), Path("_report", "rejects.jsonl")
_HASHES, _REJECTS_SUFFIX = "_hashes", ".rejects"
_REPORT_EVERY = 1000
_BLANK, _BREAKS = b" \t\r\n", bytes.maketrans(b"\r\n", b"  ")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSelectRules:
    """Which records are kept.

    Raises:
        UsageError: the number is below 1.
    """

    number: int
    """Number of records kept from all files together."""
    seed: int = 0
    """Another seed selects other records."""
    max_record_bytes: int = MAX_RECORD_BYTES

    def __post_init__(self) -> None:
        if self.number < 1:
            raise UsageError(f"--number {self.number} is below 1", fix="--number 1M is the paper's")


class _InputFile(NamedTuple):
    name: str
    path: Location
    output: str


class _FileCounts(NamedTuple):
    records: int
    rejects: Counter[str]


def select_text(
    inputs: tuple[Location, ...], output: Path, rules: TextSelectRules, *, num_workers: int = 1
) -> dict[str, Any]:
    """Write the selected records as JSON lines, a file for each input file that has any, and a report.

    Args:
        inputs: JSON lines or arrays, also .gz or .zip, or parquet; their order does not matter.
        output: new folder for a report, `_report/rejects.jsonl` as `prepare` writes it, and .jsonl files: the records
            of each input file in their order, unchanged; only line breaks inside a record of an array become blanks,
            and rows of parquet are written as JSON.
        rules: what is selected. Records with equal bytes have equal hashes, so they are kept or dropped together; if
            only some of them fit, the first ones of the first file by name are kept.
        num_workers: processes; the result does not depend on their number.

    Returns:
        The report: records = kept + not_chosen + rejected, rejects by reason, counts by file.

    Raises:
        ConfigError: the output folder is not empty or another process writes it, or two input files would be written to
            one file.
        DataError: there is no valid record, or a file has changed meanwhile.
        StorageError: the output cannot be written, or a worker was killed.
    """
    files = _name_files(inputs)
    with storage_errors("selection cannot be written", output), folder_beside(output, is_new=True) as unfinished:
        (unfinished / _HASHES).mkdir()
        tasks = [(file, rules, unfinished / _HASHES / f"{place}.npy") for place, file in enumerate(files)]
        counts = run_tasks(_hash_file, tasks, num_workers=num_workers, unit="records", reports=True)
        chosen = _choose([task[2] for task in tasks], counts, rules)
        (unfinished / REPORT_FILE).parent.mkdir()
        with (unfinished / REJECTS_FILE).open("wb") as log:
            for task in tasks:
                log.write(task[2].with_suffix(_REJECTS_SUFFIX).read_bytes())
        shutil.rmtree(unfinished / _HASHES)
        copies = [
            (file.path, rows, unfinished / file.output, rules.max_record_bytes)
            for file, rows in zip(files, chosen, strict=True)
            if len(rows)
        ]
        run_tasks(_copy_records, copies, num_workers=num_workers, unit="records", reports=True)
        report = _report(files, counts, [len(rows) for rows in chosen], rules)
        write_durably(unfinished / REPORT_FILE, (json.dumps(report, indent=1) + "\n").encode())
    return report


def hash_record(raw: bytes, seed: int) -> int:
    """Return the 64-bit hash by which a record is selected."""
    key = seed.to_bytes(16, "little", signed=True)
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8, key=key).digest(), "little")


def _name_files(inputs: tuple[Location, ...]) -> list[_InputFile]:
    """Return the files by name, with the name of the file that each is written to, which must differ."""
    places = [place_of(path) for path in inputs]
    root = os.path.commonpath([place.parent for place in places])
    names = [os.path.relpath(place, root) for place in places]
    stems = [_stem(PurePosixPath(name).name) for name in names]
    if len(set(stems)) < len(stems):
        stems = [_stem(name.replace("/", "-")) for name in names]
    for stem, count in Counter(stems).items():
        if count > 1:
            twice = [name for name, own in zip(names, stems, strict=True) if own == stem]
            what = f"{count} input files would be written to {stem}.jsonl: {', '.join(sorted(twice))[:150]}"
            raise ConfigError(what, fix="give each file once, or rename one")
    return sorted(
        _InputFile(name, path, f"{stem}.jsonl") for name, path, stem in zip(names, inputs, stems, strict=True)
    )


def _stem(name: str) -> str:
    endings = sorted((*SUFFIXES, TABLE_SUFFIX), key=len, reverse=True)
    ending = next((one for one in endings if name.lower().endswith(one)), "")
    return name[: len(name) - len(ending)]


def _read(path: Location, max_bytes: int) -> Iterator[tuple[int, bytes | RejectError]]:
    """Yield the line or row of every record, and the record as one line of JSON."""
    if not is_table(path):
        for line, raw in read_raw_records(path, max_bytes=max_bytes):
            # Line breaks occur only between the tokens of a record of an array.
            yield line, raw.strip(_BLANK).translate(_BREAKS) if isinstance(raw, bytes) else raw
        return
    for line, value in read_table_records(path, max_bytes=max_bytes):
        try:
            yield line, value if isinstance(value, RejectError) else json.dumps(value, ensure_ascii=False).encode()
        except (TypeError, UnicodeEncodeError) as error:
            yield line, RejectError("json_type", f"the row cannot be written as JSON: {error}")


def _hash_file(file: _InputFile, rules: TextSelectRules, hashes_file: Path, report: Report) -> _FileCounts:
    """Save the smallest hashes of one file with their record numbers, and its rejects; count the records."""
    smallest = TopRows(rules.number, np.uint64)
    rejects: Counter[str] = Counter()
    hashes: list[int] = []
    rows: list[int] = []
    records = reported = 0
    with hashes_file.with_suffix(_REJECTS_SUFFIX).open("w") as log:
        for row, (line, raw) in enumerate(_read(file.path, rules.max_record_bytes)):
            records += 1
            try:
                if isinstance(raw, RejectError):
                    raise raw
                parse_record(raw)
                hashes.append(hash_record(raw, rules.seed))
                rows.append(row)
            except RejectError as error:
                rejects[error.reason] += 1
                log.write(reject_row(file.name, line, None, error))
            if records % _REPORT_EVERY == 0:
                _offer(smallest, hashes, rows)
                report(_REPORT_EVERY, rejects.total() - reported)
                reported = rejects.total()
    _offer(smallest, hashes, rows)
    report(records % _REPORT_EVERY, rejects.total() - reported)
    found, places = smallest.result()
    np.save(hashes_file, np.stack([found, places.astype(np.uint64)]))
    return _FileCounts(records, rejects)


def _offer(smallest: TopRows, hashes: list[int], rows: list[int]) -> None:
    # The smallest hashes are the highest complements.
    smallest.add(~np.array(hashes, dtype=np.uint64), np.array(rows, dtype=np.int64))
    hashes.clear()
    rows.clear()


def _choose(hash_files: list[Path], counts: list[_FileCounts], rules: TextSelectRules) -> list[np.ndarray]:
    """Return the numbers of the records that are kept from each file, int64 and ascending; at least one."""
    smallest = TopRows(rules.number, np.uint64)
    first_rows = np.cumsum([0, *(count.records for count in counts)])
    for file, first_row in zip(hash_files, first_rows, strict=False):
        hashes, rows = np.load(file)
        smallest.add(hashes, rows.astype(np.int64) + first_row)
    _, kept = smallest.result()
    if not len(kept):
        rejects = sum((count.rejects for count in counts), Counter[str]())
        raise DataError(f"no record in {len(counts)} files; rejects {dict(rejects)}", fix="check --input")
    if len(kept) < rules.number:
        logger.warning("only %d records, fewer than the %d wanted; all are kept", len(kept), rules.number)
    borders = np.searchsorted(kept, first_rows)
    return [
        kept[start:end] - first for start, end, first in zip(borders[:-1], borders[1:], first_rows[:-1], strict=True)
    ]


def _copy_records(path: Location, rows: np.ndarray, output: Path, max_bytes: int, report: Report) -> None:
    """Write the records with the given numbers, int64[n] and ascending; all must still be there."""
    records, following = _read(path, max_bytes), 0
    with output.open("wb") as stream:
        for row in rows.tolist():
            _, raw = next(itertools.islice(records, row - following, None), (0, None))
            if not isinstance(raw, bytes):
                what = f"record {row + 1} does not exist any more; the file has changed meanwhile"
                raise DataError(what, where=str(path), fix="run the same command again")
            stream.write(raw + b"\n")
            report(1, 0)
            following = row + 1
        flush_to_disk(stream)


def _report(
    files: list[_InputFile], counts: list[_FileCounts], kept: list[int], rules: TextSelectRules
) -> dict[str, Any]:
    rejects = sum((count.rejects for count in counts), Counter[str]())
    records = sum(count.records for count in counts)
    return {
        "number": rules.number,
        "seed": rules.seed,
        "records": records,
        "kept": sum(kept),
        "not_chosen": records - sum(kept) - rejects.total(),
        "rejected": rejects.total(),
        "rejects": dict(sorted(rejects.items())),
        "files": [
            {
                "input": file.name,
                "records": count.records,
                "rejects": dict(sorted(count.rejects.items())),
                "kept": own,
                "output": file.output if own else None,
            }
            for file, count, own in zip(files, counts, kept, strict=True)
        ],
    }
