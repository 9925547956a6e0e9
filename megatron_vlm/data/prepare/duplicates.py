"""Find samples that repeat earlier ones: a fingerprint of each, kept beside its part until all parts are joined."""

import functools
import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_vlm.config import DataError
from megatron_vlm.data.samples import EncodedSample, ImageSegment
from megatron_vlm.data.shards.index import TOKEN_DTYPE
from megatron_vlm.platform.files.durable import flush_to_disk, open_durably

KINDS = ("documents", "images")
"""What may be dropped: samples of equal token ids and images; or of equal images, text alone where there is none."""

FINGERPRINTS_FILE, ORIGINS_FILE = "fingerprints.npy", "origins.jsonl"
FILES = (FINGERPRINTS_FILE, ORIGINS_FILE)

RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("origin", "<i8")])
"""One sample: both halves of its fingerprint, and where in `origins.jsonl` the line of its document begins."""

_DIGEST_BYTES = 16
_IMAGE_MARK = np.array([-1], dtype=TOKEN_DTYPE).tobytes()  # no token id
_BUCKET_SAMPLES = 4_000_000  # sorted at a time, about 200 MB
_MAX_OPEN_FILES = 64


def fingerprint(sample: EncodedSample, kind: str) -> bytes:
    """Return 16 bytes that are equal for samples of equal content, whatever their loss mask.

    Args:
        sample: one sample.
        kind: one of `KINDS`.
    """
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    images_only = kind == "images" and any(isinstance(segment, ImageSegment) for segment in sample.segments)
    for segment in sample.segments:
        if isinstance(segment, ImageSegment):
            # The length keeps the border between an image and what follows it.
            digest.update(_IMAGE_MARK + len(segment.encoded).to_bytes(8, "little"))
            digest.update(segment.encoded)
        elif not images_only:
            digest.update(np.asarray(segment.input_ids, dtype=TOKEN_DTYPE).tobytes())
    return digest.digest()


class FingerprintWriter:
    """Keep the fingerprints of one input file's samples, and the line and key of each document.

    Args:
        folder: of the part.
        kind: one of `KINDS`.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self._folder, self._kind = folder, kind
        self._digests, self._origins = bytearray(), array("q")
        self._stream = (folder / ORIGINS_FILE).open("wb")

    def add(self, samples: Sequence[EncodedSample], file: str, line: int | None, key: str | None) -> None:
        """Append the samples of one document."""
        for sample in samples:
            self._digests += fingerprint(sample, self._kind)
            self._origins.append(self._stream.tell())
        self._stream.write(json.dumps([file, line, key]).encode() + b"\n")

    def close(self) -> None:
        """Write what is in memory and make it durable."""
        with self._stream as stream:
            flush_to_disk(stream)
        records = np.empty(len(self._origins), dtype=RECORD)
        halves = np.frombuffer(bytes(self._digests), dtype="<u8").reshape(-1, 2)
        records["high"], records["low"], records["origin"] = halves[:, 0], halves[:, 1], self._origins
        with (self._folder / FINGERPRINTS_FILE).open("wb") as stream:
            np.save(stream, records)
            flush_to_disk(stream)


class Fingerprints:
    """The fingerprints of several pieces, one after the other; nothing of a piece is held longer than needed.

    Args:
        folders: of the pieces, in order.
        samples: how many each piece has.
    """

    def __init__(self, folders: Sequence[Path], samples: Sequence[int]) -> None:
        self.folders, self.ends = folders, np.cumsum(samples, dtype=np.int64)
        # A map keeps a file descriptor, and there may be thousands of pieces.
        self._records = functools.lru_cache(maxsize=_MAX_OPEN_FILES)(self._map)
        self._origins = functools.lru_cache(maxsize=_MAX_OPEN_FILES)(self._open)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def start(self, piece: int) -> int:
        """Return the position of the first sample of a piece among those of all."""
        return int(self.ends[piece - 1]) if piece else 0

    def records(self, piece: int) -> np.ndarray:
        """Return the records of one piece, RECORD[samples].

        Raises:
            DataError: they are missing or damaged.
        """
        return self._records(piece)

    def origin(self, position: int) -> tuple[str, int | None, str | None]:
        """Return input file, line and key of the document of a sample; its position is that among those of all."""
        piece = int(np.searchsorted(self.ends, position, side="right"))
        stream = self._origins(piece)
        stream.seek(int(self.records(piece)["origin"][position - self.start(piece)]))
        try:
            file, line, key = json.loads(stream.readline())
        except ValueError:
            raise _damaged(self.folders[piece] / ORIGINS_FILE, "have no line of each document") from None
        return file, line, key

    def _map(self, piece: int) -> np.ndarray:
        path = self.folders[piece] / FINGERPRINTS_FILE
        expected = int(self.ends[piece]) - self.start(piece)
        try:
            # An empty file cannot be mapped.
            records = np.load(path, mmap_mode="r" if expected else None, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise _damaged(path, f"cannot be read: {error}") from None
        if records.dtype != RECORD or records.shape != (expected,):
            raise _damaged(path, f"have {records.size} entries, the part has {expected} samples")
        return records

    def _open(self, piece: int) -> BinaryIO:
        path = self.folders[piece] / ORIGINS_FILE
        try:
            return path.open("rb")
        except OSError as error:
            raise _damaged(path, f"cannot be read: {error}") from None


@dataclass(frozen=True, slots=True)
class Repeats:
    """Samples that repeat an earlier one, by their position among the samples of all pieces."""

    samples: np.ndarray
    """int64[n], ascending."""
    originals: np.ndarray
    """int64[n], the first sample with the same content as each."""


def find_repeats(fingerprints: Fingerprints, *, bucket_samples: int = _BUCKET_SAMPLES) -> Repeats:
    """Find every sample whose fingerprint an earlier one has.

    The samples are sorted in buckets of equal remainders of their fingerprints, so that memory does not grow with
    their number: all pieces are read once for each bucket.

    Args:
        fingerprints: of all pieces.
        bucket_samples: how many samples are sorted at a time, about.
    """
    num_buckets = max(1, -(-len(fingerprints) // bucket_samples))
    found = [_repeats_of_bucket(fingerprints, bucket, num_buckets) for bucket in range(num_buckets)]
    samples = np.concatenate([one.samples for one in found])
    order = np.argsort(samples)
    return Repeats(samples[order], np.concatenate([one.originals for one in found])[order])


def _repeats_of_bucket(fingerprints: Fingerprints, bucket: int, num_buckets: int) -> Repeats:
    highs, lows = [np.zeros(0, dtype=np.uint64)], [np.zeros(0, dtype=np.uint64)]
    places: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    for piece in range(len(fingerprints.ends)):
        records = fingerprints.records(piece)
        high = np.ascontiguousarray(records["high"])
        own = np.flatnonzero(high % np.uint64(num_buckets) == bucket)
        highs.append(high[own])
        lows.append(records["low"][own])
        places.append(own + fingerprints.start(piece))
    high, low, place = np.concatenate(highs), np.concatenate(lows), np.concatenate(places)
    order = np.lexsort((low, high))  # stable: the first of equal ones comes first
    high, low, place = high[order], low[order], place[order]
    repeats = np.zeros(len(place), dtype=bool)
    repeats[1:] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    first = np.maximum.accumulate(np.where(repeats, 0, np.arange(len(place))))
    return Repeats(place[repeats], place[first[repeats]])


def join_fingerprints(output: Path, folders: Sequence[Path]) -> None:
    """Write the files of several pieces as those of one, for a share of a dataset.

    Raises:
        DataError: the fingerprints of a piece cannot be read.
    """
    with open_durably(output / FINGERPRINTS_FILE) as fingerprints, open_durably(output / ORIGINS_FILE) as origins:
        parts: list[np.ndarray] = [np.zeros(0, dtype=RECORD)]
        for folder in folders:
            try:
                records = np.load(folder / FINGERPRINTS_FILE, allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise _damaged(folder / FINGERPRINTS_FILE, f"cannot be read: {error}") from None
            records["origin"] += origins.tell()
            parts.append(records)
            with (folder / ORIGINS_FILE).open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    origins.write(chunk)
        np.save(fingerprints, np.concatenate(parts))


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"fingerprints {what}", where=str(path), fix="prepare this part again, with --drop-duplicates")
