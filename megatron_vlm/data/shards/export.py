"""Export prepared shards as WebDataset tars, for other programs and for `prepare interleaved`.

Each sample consists of `KEY.json`, with `texts`, `images` and `train`, and its images `KEY.0.jpg`, `KEY.1.png` and so
on. The bytes of a tar do not depend on the time or the number of processes, and a tar is either complete or absent.
"""

import functools
import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_vlm.config import ConfigError, DataError, UsageError
from megatron_vlm.data.images.formats import find_format
from megatron_vlm.data.samples import EncodedSample, ImageSegment
from megatron_vlm.data.shards.dataset import ShardedDataset
from megatron_vlm.data.tasks.processes import Report, run_tasks
from megatron_vlm.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_vlm.platform.files.durable import UNFINISHED, flush_to_disk, open_durably, storage_errors
from megatron_vlm.platform.files.locks import locked

_STATE_FILE = ".export"  # locked while tars are written; without a suffix, searches for tars and JSON do not find it
_REPORT_EVERY = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportJob:
    """What to export; small, because it is sent with every task."""

    folder: Path
    """The dataset."""
    output: Path
    """The folder of the tars."""
    tokenizer: Path
    """The tokenizer of the shards."""
    samples_per_shard: int = 10_000
    """Samples of every tar but the last."""


def export_webdataset(job: ExportJob, *, num_workers: int = 1) -> int:
    """Write a dataset as WebDataset tars `00000.tar` and so on, and resume an interrupted export.

    The result does not depend on the number of processes, `num_workers`.

    Returns:
        The number of tars.

    Raises:
        ConfigError: the output folder holds something else, or another process is exporting into it.
        UsageError: samples_per_shard is below 1.
        DataError: the dataset is damaged or was made with another tokenizer.
        StorageError: a tar cannot be written.
    """
    if job.samples_per_shard < 1:
        raise UsageError(f"--samples-per-shard {job.samples_per_shard} is below 1", fix="use 1 or more")
    dataset, tokenizer = ShardedDataset.open(job.folder), load_tokenizer(job.tokenizer)
    dataset.check_tokenizer(tokenizer.facts)
    options = {"tokenizer": tokenizer.sha256, "samples_per_shard": job.samples_per_shard}
    count = -(-len(dataset) // job.samples_per_shard)
    width = max(5, len(str(count - 1)))
    tasks = [(job, dataset.fingerprint, number, job.output / f"{number:0{width}d}.tar") for number in range(count)]
    with _claimed(job.output, {"dataset": dataset.fingerprint} | options):
        run_tasks(write_tar, tasks, num_workers=num_workers, unit="samples", reports=True)
    return count


def write_tar(job: ExportJob, fingerprint: str, number: int, path: Path, report: Report) -> None:
    """Write the tar `number` of the dataset with this fingerprint to `path`, unless it already exists.

    Raises:
        StorageError: it cannot be written.
    """
    dataset, tokenizer = _open(job.folder, job.tokenizer, fingerprint)
    first = number * job.samples_per_shard
    last = min(first + job.samples_per_shard, len(dataset))
    if path.exists():
        report(last - first, 0)
        return
    # Shared: a worker of an export that was killed may live for a moment after the next one has begun.
    with storage_errors("export stopped", path, kept="finished tars are kept"):
        with open_durably(path, is_shared=True) as stream:
            _write_samples(stream, dataset, tokenizer, range(first, last), report)


def describe_sample(sample: EncodedSample, tokenizer: Tokenizer) -> tuple[dict[str, list], dict[str, bytes]]:
    """Return a sample as three lists, with one entry for each text and each image, and its image files by name.

    `prepare interleaved --separator ""` makes samples of it with the same text, images and loss mask. These may differ:

    - BOS and EOS are not part of a text. Prepared again, they stand at the ends of a sample, as its options say; those
      between the turns of a conversation are gone, and so are all other control tokens, such as `<|im_end|>`.
    - Tokens that are not how the tokenizer encodes their text, half of a character for example.

    Raises:
        DataError: an image has an unknown format.
    """
    record: dict[str, list] = {"texts": [], "images": [], "train": []}
    files: dict[str, bytes] = {}
    before: list[int] = []  # the text that the next one continues
    entry: tuple[str | None, str | None, bool]
    for segment in sample.segments:
        if isinstance(segment, ImageSegment):
            if (file_format := find_format(image := segment.encoded)) is None:
                what = f"image has an unknown format; starts with {image[:12]!r}"
                raise DataError(what, fix="check the shards: data verify")
            name = f"{len(files)}.{file_format.extension}"
            files[name] = image
            before, entry = [], (None, name, False)
        else:
            tokens = [token for token in segment.input_ids.tolist() if not tokenizer.is_control(token)]
            # Decoded on its own, a text loses the blank that it may begin with; after what it continues, it does not.
            text = tokenizer.decode(before + tokens)[len(tokenizer.decode(before)) :]
            if not text:
                continue
            before, entry = tokens, (text, None, segment.train)
        for values, value in zip(record.values(), entry, strict=True):
            values.append(value)
    return record, files


def _write_samples(
    stream: BinaryIO, dataset: ShardedDataset, tokenizer: Tokenizer, samples: range, report: Report
) -> None:
    # The entries hold no names, times or owners of this machine, and USTAR has no other fields.
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for done, sample in enumerate(samples, start=1):
            record, files = describe_sample(dataset[sample], tokenizer)
            content = json.dumps(record, ensure_ascii=False).encode()
            for name, data in (("json", content), *files.items()):
                entry = tarfile.TarInfo(f"{sample:09d}.{name}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
            if done % _REPORT_EVERY == 0:
                report(_REPORT_EVERY, 0)
    report(len(samples) % _REPORT_EVERY, 0)


@contextmanager
def _claimed(output: Path, state: dict[str, Any]) -> Iterator[None]:
    """Lock the output folder against other processes and other exports, creating it if needed.

    Raises:
        ConfigError: it is in use or holds something else.
        StorageError: it cannot be written.
    """
    path, content = output / _STATE_FILE, json.dumps(state).encode()
    with ExitStack() as held:
        with storage_errors("output folder cannot be written", output):
            output.mkdir(parents=True, exist_ok=True)
            if not path.exists() and any(output.iterdir()):
                raise ConfigError("output folder is not empty", where=str(output), fix="give another --output")
            lock = held.enter_context(locked(path))
            if lock is None:
                what = "another process is exporting into this folder"
                raise ConfigError(what, where=str(output), fix="wait for it, or stop it")
            _write_state(lock, content, output)
            for left_over in output.glob(f"*{UNFINISHED}"):
                left_over.unlink()
        yield


def _write_state(lock: BinaryIO, content: bytes, output: Path) -> None:
    """Record what is exported, unless it is recorded; an incomplete record means nothing while there is no tar.

    Raises:
        ConfigError: the folder belongs to another export.
    """
    lock.seek(0)
    found = lock.read()
    if found == content:
        return
    if not content.startswith(found) or any(output.glob("*.tar")):
        what = "output folder holds an export of another dataset, or with other options"
        raise ConfigError(what, where=str(output), fix="give another --output, or delete the folder")
    # In place, because renaming would replace the locked file.
    lock.truncate(0)
    lock.write(content)
    flush_to_disk(lock)


@functools.lru_cache(maxsize=1)
def _open(folder: Path, tokenizer: Path, fingerprint: str) -> tuple[ShardedDataset, Tokenizer]:
    """Open the dataset and the tokenizer of an export, once per process."""
    dataset = ShardedDataset.open(folder)
    if dataset.fingerprint != fingerprint:
        raise DataError("dataset has changed since then", where=str(folder), fix="export it again into another folder")
    return dataset, load_tokenizer(tokenizer)
