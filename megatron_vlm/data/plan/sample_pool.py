"""The samples of all datasets of a blend under their global ids, as long as they are in a row."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from megatron_vlm.config import BlendEntry, DataError
from megatron_vlm.data.plan.fragments import find_cuts

Overflow = Literal["truncate", "split", "drop", "fail"]


class SampleLengths(Protocol):
    """What the plan needs to know of a dataset; `ShardedDataset` has it."""

    fingerprint: str
    """Changes with the content."""

    @property
    def num_images(self) -> np.ndarray:
        """int32[samples]."""

    @property
    def text_lengths(self) -> np.ndarray:
        """int32[samples] [tokens]."""

    def __len__(self) -> int: ...

    def outlines(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return borders, kinds and tokens of the segments of some samples, as `ShardedDataset.outlines` does."""


@dataclass(frozen=True, slots=True)
class SamplePool:
    """Samples under their global ids: those of all datasets one after the other, then the pieces of `pieces`."""

    lengths: np.ndarray
    """int32[ids], as in a row: cut where the sample is longer [tokens]."""
    num_images: np.ndarray
    """int32[ids]."""
    usable: tuple[np.ndarray, ...]
    """Per dataset: global ids of the samples that take part."""
    pieces: np.ndarray
    """int64[3, pieces]; the table of a `PieceTable`, empty where no sample is split."""
    truncated: int
    """Samples that are cut."""
    split: int
    """Samples that become several."""
    dropped: int
    """Samples that are left out."""

    @property
    def num_samples(self) -> int:
        """Samples of all datasets; the ids from here on are of pieces."""
        return len(self.lengths) - self.pieces.shape[1]


def collect_samples(
    blend: Sequence[BlendEntry],
    datasets: Sequence[SampleLengths],
    *,
    seq_length: int,
    num_image_tokens: int,
    overflow: Overflow,
) -> SamplePool:
    """Number the samples of all datasets and settle what happens to those longer than a row.

    Raises:
        DataError: with overflow "fail", a sample is longer than a row; with "split", an image is.
    """
    settled = [
        _settle(entry, dataset, seq_length, num_image_tokens, overflow)
        for entry, dataset in zip(blend, datasets, strict=True)
    ]
    usable, tables = [], []
    first, first_piece = 0, sum(map(len, datasets))
    for part in settled:
        table = part.pieces + np.array([[first], [0], [0]])
        piece_ids = np.arange(first_piece, first_piece + table.shape[1])
        part.kept[:] += first
        usable.append(np.concatenate([part.kept, piece_ids]) if len(piece_ids) else part.kept)
        tables.append(table)
        first += len(part.lengths)
        first_piece += len(piece_ids)
    pieces = np.concatenate(tables, axis=1)
    return SamplePool(
        np.concatenate([part.lengths for part in settled] + [(pieces[2] - pieces[1]).astype(np.int32)]),
        np.concatenate([part.num_images for part in settled] + [part.images_of_pieces for part in settled]),
        tuple(usable),
        pieces,
        truncated=sum(part.truncated for part in settled),
        split=sum(part.split for part in settled),
        dropped=sum(part.dropped for part in settled),
    )


def cut_outlines(
    borders: np.ndarray, is_image: np.ndarray, text_lengths: np.ndarray, max_tokens: int, num_image_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and images of samples that are cut after the last whole image and the last token that fit.

    Args:
        borders: int64[samples + 1]; segments of each sample, at least one.
        is_image: bool[segments]; in reading order.
        text_lengths: int[segments]; 0 for images [tokens].
        max_tokens: where the samples are cut.
        num_image_tokens: tokens of an image.

    Returns:
        Two int64[samples].
    """
    ends = np.cumsum(np.where(is_image, num_image_tokens, text_lengths), dtype=np.int64)
    starts = np.concatenate([[0], ends])[borders[:-1]]
    ends -= np.repeat(starts, np.diff(borders))
    fits = ends <= max_tokens
    whole = np.add.reduceat(fits, borders[:-1], dtype=np.int64)
    num_images = np.add.reduceat(fits & is_image, borders[:-1], dtype=np.int64)
    last = borders[:-1] + whole - 1
    kept = np.where(whole > 0, ends[last], 0)
    cut_in_text = (whole < np.diff(borders)) & ~is_image[np.minimum(last + 1, len(is_image) - 1)]
    return np.where(cut_in_text, max_tokens, kept), num_images


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settled:
    """One dataset; samples are counted from its first."""

    lengths: np.ndarray
    num_images: np.ndarray
    kept: np.ndarray
    pieces: np.ndarray = field(default_factory=lambda: np.empty((3, 0), dtype=np.int64))
    images_of_pieces: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    truncated: int = 0
    split: int = 0
    dropped: int = 0


def _settle(
    entry: BlendEntry, dataset: SampleLengths, seq_length: int, num_image_tokens: int, overflow: Overflow
) -> _Settled:
    num_images, kept = dataset.num_images, np.arange(len(dataset))
    total = num_images * np.int32(num_image_tokens) + dataset.text_lengths
    longer = np.flatnonzero(total > seq_length)
    if not len(longer):
        return _Settled(lengths=total, num_images=num_images, kept=kept)
    if overflow == "fail":
        raise _too_long(entry, seq_length, total, len(longer))
    if overflow == "drop":
        kept = np.delete(kept, longer)
        return _Settled(lengths=total, num_images=num_images, kept=kept, dropped=len(longer))
    num_images, outlines = num_images.copy(), dataset.outlines(longer)
    if overflow == "split":
        _check_images_fit(entry, longer[num_images[longer] > 0], seq_length, num_image_tokens)
        cuts = find_cuts(*outlines, seq_length, num_image_tokens)
        is_first = cuts.first == 0
        total[longer], num_images[longer] = cuts.last[is_first], cuts.num_images[is_first]
        return _Settled(
            lengths=total,
            num_images=num_images,
            kept=kept,
            pieces=np.stack([longer[cuts.owner], cuts.first, cuts.last])[:, ~is_first],
            images_of_pieces=cuts.num_images[~is_first].astype(np.int32),
            split=len(longer),
        )
    total[longer], num_images[longer] = cut_outlines(*outlines, seq_length, num_image_tokens)
    nothing_fits = longer[total[longer] == 0]
    return _Settled(
        lengths=total,
        num_images=num_images,
        kept=np.delete(kept, nothing_fits),
        truncated=len(longer) - len(nothing_fits),
        dropped=len(nothing_fits),
    )


def _check_images_fit(entry: BlendEntry, with_images: np.ndarray, seq_length: int, num_image_tokens: int) -> None:
    # An image that is longer than a row makes its sample too long, so that no such sample escapes.
    if num_image_tokens > seq_length and len(with_images):
        raise DataError(
            f"an image takes {num_image_tokens} tokens, data.seq_length is {seq_length}: no row can hold it",
            where=f"{entry.path} sample {with_images[0]}",
            fix=f"raise data.seq_length to {num_image_tokens} or more, or set data.overflow=drop",
        )


def _too_long(entry: BlendEntry, seq_length: int, total: np.ndarray, number: int) -> DataError:
    worst = int(total.argmax())
    return DataError(
        f"{number} samples are longer than data.seq_length={seq_length}; the longest has {int(total[worst])} tokens",
        where=f"{entry.path} sample {worst}",
        fix="raise data.seq_length, or set data.overflow to truncate, split or drop",
    )
