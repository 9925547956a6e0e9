"""Write a dataset again without the samples that repeat earlier ones: `data dedupe`.

Every sample gets a fingerprint of 16 bytes. These are kept in files and sorted a bucket at a time, so memory does not
grow with the number of samples. Of equal samples, the first in the order of the shards stays.
"""

import dataclasses
import functools
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_vlm.config import ConfigError, UsageError
from megatron_vlm.data.prepare.array_task import PART_OPTION
from megatron_vlm.data.prepare.output import dataset_beside, link_shard
from megatron_vlm.data.samples import EncodedSample, ImageSegment
from megatron_vlm.data.shards.dataset import ShardedDataset
from megatron_vlm.data.shards.index import TOKEN_DTYPE
from megatron_vlm.data.shards.manifest import DUPLICATES_NOTE, REJECTS_FILE, Manifest, ShardFacts, save_manifest
from megatron_vlm.data.shards.writer import ShardWriter
from megatron_vlm.data.tasks.processes import Report, run_tasks

KINDS = ("documents", "images")
"""What equal samples share: token ids and images; or the images only, and the token ids where there is no image."""

_OPTION, _FINGERPRINTS = "deduplicated", ".fingerprints"
_DIGEST_BYTES = 16
_IMAGE_MARK = np.array([-1], dtype=TOKEN_DTYPE).tobytes()  # not a token id
_BUCKET_SAMPLES = 4_000_000  # sorted at a time, about 200 MB
_REPORT_EVERY = 100


def deduplicate(folder: Path, output: Path, *, by: str, num_workers: int = 1) -> Manifest:
    """Write a dataset without the samples that repeat an earlier one, and return its manifest.

    A shard without duplicates is a hard link; one that loses samples is written again; one that loses all is left out.
    Documents and rejects stay those of the preparation; the dropped samples are counted among the notes.

    Args:
        folder: the dataset; it is not changed.
        output: new folder on the same file system; left alone if it already holds the same dataset.
        by: one of `KINDS`.
        num_workers: processes; the result does not depend on it.

    Raises:
        UsageError: `by` is not one of `KINDS`.
        ConfigError: the dataset comes from one task of a job array, or the output folder holds something else.
        DataError: the dataset is unfinished or damaged.
        StorageError: the output cannot be written, or is on another file system.
    """
    if by not in KINDS:
        raise UsageError(f"--by {by} is not one of {', '.join(KINDS)}", fix="choose one of them")
    whole = ShardedDataset.open(folder).manifest
    if PART_OPTION in whole.options:
        raise ConfigError("dataset is a part of one", where=str(folder), fix="join the parts first: data merge")
    singles = [dataclasses.replace(whole, shards=(shard,)) for shard in whole.shards]
    run = functools.partial(run_tasks, num_workers=num_workers)
    with dataset_beside(output) as unfinished:
        work = unfinished / _FINGERPRINTS
        work.mkdir()
        files = [work / f"{shard.name}.npy" for shard in whole.shards]
        tasks = [(folder, single, by, file) for single, file in zip(singles, files, strict=True)]
        run(save_fingerprints, tasks, unit="samples", reports=True)
        gone = _by_shard(find_repeats(files), whole.shards)
        shutil.rmtree(work)
        kept = [(n, own) for n, own in enumerate(gone) if len(own) < whole.shards[n].counts.samples]
        writing = [(folder, singles[n], own, unfinished / f"{new:05d}") for new, (n, own) in enumerate(kept)]
        shards = tuple(run(write_rest, writing, unit="shards"))
        manifest = _describe(whole, shards, by)
        if whole.rejects_file is not None:
            (unfinished / REJECTS_FILE).hardlink_to(folder / REJECTS_FILE)
        save_manifest(manifest, unfinished)
    return manifest


def fingerprint(sample: EncodedSample, by: str) -> bytes:
    """Return 16 bytes that are equal for samples of equal content by one of `KINDS`, whatever their loss masks."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    images_only = by == "images" and any(isinstance(segment, ImageSegment) for segment in sample.segments)
    for segment in sample.segments:
        if isinstance(segment, ImageSegment):
            # The length marks the border between an image and what follows it.
            digest.update(_IMAGE_MARK + len(segment.encoded).to_bytes(8, "little"))
            digest.update(segment.encoded)
        elif not images_only:
            digest.update(np.asarray(segment.input_ids, dtype=TOKEN_DTYPE).tobytes())
    return digest.digest()


def save_fingerprints(folder: Path, single: Manifest, by: str, target: Path, report: Report) -> None:
    """Write the fingerprints of the only shard in the manifest `single` as uint64[samples, 2] into a .npy file."""
    samples = ShardedDataset(folder, single, fingerprint="")
    digests = bytearray()
    for number in range(len(samples)):
        digests += fingerprint(samples[number], by)
        if (number + 1) % _REPORT_EVERY == 0:
            report(_REPORT_EVERY, 0)
    report(len(samples) % _REPORT_EVERY, 0)
    np.save(target, np.frombuffer(bytes(digests), dtype="<u8").reshape(-1, 2))


def find_repeats(files: Sequence[Path], *, bucket_samples: int = _BUCKET_SAMPLES) -> np.ndarray:
    """Return the samples whose fingerprint an earlier one has, int64[n], ascending, numbered through all files.

    Args:
        files: what `save_fingerprints` wrote, in the order of the shards; each is read once for each bucket.
        bucket_samples: about how many samples, with equal remainders of their fingerprints, are sorted at a time.
    """
    num_samples = sum(len(np.load(file, mmap_mode="r")) for file in files)
    num_buckets = max(1, -(-num_samples // bucket_samples))
    found = [_repeats_in_bucket(files, bucket, num_buckets) for bucket in range(num_buckets)]
    return np.sort(np.concatenate(found))


def _repeats_in_bucket(files: Sequence[Path], bucket: int, num_buckets: int) -> np.ndarray:
    halves, places, start = [], [], 0
    for file in files:
        own = np.load(file, mmap_mode="r")
        inside = np.flatnonzero(own[:, 0] % np.uint64(num_buckets) == bucket)
        halves.append(own[inside])
        places.append(inside + start)
        start += len(own)
    digests, place = np.concatenate(halves), np.concatenate(places)
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: of equal samples, the first stays first
    digests, place = digests[order], place[order]
    return place[1:][(digests[1:] == digests[:-1]).all(axis=1)]


def _by_shard(repeats: np.ndarray, shards: Sequence[ShardFacts]) -> list[np.ndarray]:
    """Return the repeats of each shard, numbered from its own first sample."""
    ends = np.cumsum([shard.counts.samples for shard in shards])
    own = np.split(repeats, np.searchsorted(repeats, ends[:-1]))
    return [numbers - (end - shard.counts.samples) for numbers, end, shard in zip(own, ends, shards, strict=True)]


def write_rest(folder: Path, single: Manifest, gone: np.ndarray, target: Path) -> ShardFacts:
    """Write the only shard in the manifest `single` again without the samples `gone`, int64[n], and return its facts.

    A shard that keeps all samples is linked; `target` is the path of the new one, without suffix.
    """
    (facts,) = single.shards
    if not len(gone):
        link_shard(folder / facts.name, target)
        return dataclasses.replace(facts, name=target.name)
    samples = ShardedDataset(folder, single, fingerprint="")
    writer = ShardWriter(target)
    for number in np.delete(np.arange(len(samples)), gone).tolist():
        writer.add(samples[number])
    return writer.close(facts.input)


def _describe(whole: Manifest, shards: tuple[ShardFacts, ...], by: str) -> Manifest:
    dropped = whole.counts.samples - sum(shard.counts.samples for shard in shards)
    notes = whole.notes | {DUPLICATES_NOTE: whole.notes.get(DUPLICATES_NOTE, 0) + dropped}
    options = whole.options | {_OPTION: [*whole.options.get(_OPTION, ()), by]}
    return dataclasses.replace(whole, shards=shards, notes=dict(sorted(notes.items())), options=options)
