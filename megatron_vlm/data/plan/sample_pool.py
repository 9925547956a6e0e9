"""The samples of all datasets of a blend by global id, with the lengths they have in a row.

Ids number the samples of all datasets, one after the other, then the further fragments of split ones. The datasets that
a later step of the blend adds follow in the same way: ids that a run has used stay what they were.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import numpy as np

from megatron_vlm.config import BlendEntry, ConfigError, DataError
from megatron_vlm.config.blend import datasets_of, steps_of
from megatron_vlm.data.plan.fragments import Cuts, find_cuts
from megatron_vlm.data.plan.image_tokens import ImageTokens
from megatron_vlm.data.plan.outlines import read_outlines
from megatron_vlm.data.plan.sample_lengths import SampleLengths, measure_images
from megatron_vlm.data.samples import Outlines

Overflow = Literal["truncate", "split", "drop", "fail"]


@dataclass(frozen=True, slots=True)
class SamplePool:
    """Samples by global id."""

    lengths: np.ndarray
    """int32[ids]; length in a row, at most that of the row [tokens]."""
    num_images: np.ndarray
    """int32[ids]."""
    usable: tuple[np.ndarray, ...]
    """For each dataset, the global ids of the samples that are used."""
    fragments: np.ndarray
    """int64[3, fragments]; table of a `FragmentTable`, empty if no sample is split."""
    truncated: int
    """Samples whose end is cut off."""
    split: int
    """Samples that become several fragments."""
    dropped: int
    """Samples that are left out."""
    nothing_to_train: tuple[int, ...]
    """For each dataset, the samples or fragments that are left out because a cut leaves them no token with a loss."""
    tokens_per_image: tuple[int, int]
    """Fewest and most tokens of an image in the datasets, 0 if they have no images."""
    samples: tuple[tuple[int, int], ...]
    """Begin and end of each range of ids of samples; the ids between and behind them belong to fragments."""
    varying_image_lengths: np.ndarray | None = None
    """int32[ids]; tokens of all images of a sample; None if every image has the same number."""

    @property
    def image_lengths(self) -> np.ndarray:
        """Tokens of all images of each sample, int32[ids]."""
        if self.varying_image_lengths is not None:
            return self.varying_image_lengths
        return self.num_images * np.int32(self.tokens_per_image[0])


def collect_samples(
    blend: tuple[BlendEntry, ...],
    datasets: Sequence[SampleLengths],
    *,
    seq_length: int,
    image_tokens: ImageTokens,
    overflow: Overflow,
    max_images: int | None = None,
) -> SamplePool:
    """Number the samples and decide what happens to those longer than a row, or with more images.

    There is one dataset per entry of `datasets_of(blend)`.

    Raises:
        ConfigError: cuts leave no sample of a dataset a token with a loss.
        DataError: with overflow "fail", a sample is longer than a row or has more than `max_images`; with "split", an
            image is longer than a row.
    """
    settled = [
        _settle(entry, dataset, seq_length, image_tokens, overflow, max_images)
        for entry, dataset in zip(datasets_of(blend), datasets, strict=True)
    ]
    groups = [_number(group) for group in _by_first_step(blend, settled)]
    offsets = np.cumsum([0, *(len(group.lengths) for group in groups)]).tolist()
    known = [tokens for one in settled for tokens in one.tokens_per_image or ()]
    # Either all datasets have them or none has.
    varying = [group.image_lengths for group in groups if group.image_lengths is not None]
    return SamplePool(
        np.concatenate([group.lengths for group in groups]),
        np.concatenate([group.num_images for group in groups]),
        tuple(
            ids + first if first else ids for group, first in zip(groups, offsets, strict=False) for ids in group.usable
        ),
        np.concatenate([_from(first, group.fragments) for group, first in zip(groups, offsets, strict=False)], axis=1),
        truncated=sum(one.truncated for one in settled),
        split=sum(one.split for one in settled),
        dropped=sum(one.dropped for one in settled),
        nothing_to_train=tuple(one.nothing_to_train for one in settled),
        tokens_per_image=(min(known, default=0), max(known, default=0)),
        samples=tuple((first, first + group.num_samples) for group, first in zip(groups, offsets, strict=False)),
        varying_image_lengths=np.concatenate(varying) if varying else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """The datasets that a step of the blend adds; ids are counted from their first."""

    lengths: np.ndarray
    num_images: np.ndarray
    image_lengths: np.ndarray | None
    usable: tuple[np.ndarray, ...]
    fragments: np.ndarray
    num_samples: int


def _by_first_step(blend: tuple[BlendEntry, ...], settled: Sequence["_Settled"]) -> list[Sequence["_Settled"]]:
    borders = [0]
    for step in steps_of(blend):
        borders.append(max(borders[-1], *(place + 1 for place in step.datasets)))
    return [settled[first:last] for first, last in pairwise(borders) if last > first]


def _number(group: Sequence["_Settled"]) -> _Group:
    usable, tables = [], []
    first = 0
    num_samples = first_fragment = sum(len(one.lengths) for one in group)
    for one in group:
        one.kept[:] += first
        ids = first_fragment + one.kept_fragments
        usable.append(np.concatenate([one.kept, ids]) if len(ids) else one.kept)
        tables.append(_from(first, one.fragments))
        first += len(one.lengths)
        first_fragment += one.fragments.shape[1]
    fragments = np.concatenate(tables, axis=1)
    varying = [one.image_lengths for one in group if one.image_lengths is not None]
    return _Group(
        lengths=np.concatenate([one.lengths for one in group] + [(fragments[2] - fragments[1]).astype(np.int32)]),
        num_images=np.concatenate([one.num_images for one in group] + [one.images_of_fragments for one in group]),
        image_lengths=np.concatenate(varying + [one.image_lengths_of_fragments for one in group]) if varying else None,
        usable=tuple(usable),
        fragments=fragments,
        num_samples=num_samples,
    )


def _from(first: int, fragments: np.ndarray) -> np.ndarray:
    return fragments + np.array([[first], [0], [0]])


def _nothing() -> np.ndarray:
    return np.empty(0, dtype=np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settled:
    """One dataset; samples are counted from its first."""

    lengths: np.ndarray
    num_images: np.ndarray
    kept: np.ndarray
    image_lengths: np.ndarray | None
    """None if every image has the same number of tokens."""
    tokens_per_image: tuple[int, int] | None
    fragments: np.ndarray = field(default_factory=lambda: np.empty((3, 0), dtype=np.int64))
    kept_fragments: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """Places in `fragments`."""
    images_of_fragments: np.ndarray = field(default_factory=_nothing)
    image_lengths_of_fragments: np.ndarray = field(default_factory=_nothing)
    truncated: int = 0
    split: int = 0
    dropped: int = 0
    nothing_to_train: int = 0


def _settle(
    entry: BlendEntry,
    dataset: SampleLengths,
    seq_length: int,
    image_tokens: ImageTokens,
    overflow: Overflow,
    max_images: int | None,
) -> _Settled:
    images = measure_images(dataset, image_tokens)
    whole = _Settled(
        lengths=images.lengths + dataset.text_lengths,
        num_images=dataset.num_images,
        kept=np.arange(len(dataset)),
        image_lengths=images.lengths if image_tokens.constant is None else None,
        tokens_per_image=images.tokens_per_image,
    )
    is_longer = whole.lengths > seq_length
    if overflow == "fail" and is_longer.any():
        raise _too_long(entry, seq_length, whole.lengths, int(is_longer.sum()))
    if max_images is not None:
        too_many = whole.num_images > max_images
        if overflow == "fail" and too_many.any():
            raise _too_many_images(entry, max_images, whole.num_images, int(too_many.sum()))
        is_longer |= too_many
    longer = np.flatnonzero(is_longer)
    if not len(longer):
        return whole
    if overflow == "drop":
        return replace(whole, kept=np.delete(whole.kept, longer), dropped=len(longer))
    outlines = read_outlines(dataset, longer, image_tokens)
    if overflow == "split":
        _check_images_fit(entry, outlines, longer, seq_length)
    cuts = find_cuts(outlines, seq_length, first_only=overflow == "truncate", max_images=max_images)
    short = _shorten(whole, longer, cuts, overflow)
    if short.nothing_to_train and not len(short.kept) + len(short.kept_fragments):
        raise _nothing_to_train(entry, seq_length, max_images)
    return short


def _shorten(whole: _Settled, longer: np.ndarray, cuts: Cuts, overflow: Overflow) -> _Settled:
    """Replace the samples that are too long by their first fragments, and append the others.

    Fragments without a token that has a loss keep their ids, but are not used: `prepare` takes no such sample either.
    """
    is_first = cuts.first == 0
    lengths, num_images = cuts.last[is_first], whole.num_images.copy()  # the array belongs to the dataset
    whole.lengths[longer], num_images[longer] = lengths, cuts.num_images[is_first]
    if whole.image_lengths is not None:
        whole.image_lengths[longer] = cuts.image_lengths[is_first]
    nothing_fits = longer[lengths == 0]
    has_labels = cuts.num_labels > 0
    without_labels = longer[~has_labels[is_first] & (lengths > 0)]
    shortened = len(longer) - len(nothing_fits)
    return replace(
        whole,
        num_images=num_images,
        kept=np.delete(whole.kept, longer[~has_labels[is_first]]),
        fragments=np.stack([longer[cuts.owner], cuts.first, cuts.last])[:, ~is_first],
        kept_fragments=np.flatnonzero(has_labels[~is_first]),
        images_of_fragments=cuts.num_images[~is_first].astype(np.int32),
        image_lengths_of_fragments=cuts.image_lengths[~is_first].astype(np.int32),
        dropped=len(nothing_fits),
        split=shortened if overflow == "split" else 0,
        truncated=shortened - len(without_labels) if overflow == "truncate" else 0,
        nothing_to_train=len(without_labels) + int((~has_labels[~is_first]).sum()),
    )


def _check_images_fit(entry: BlendEntry, outlines: Outlines, longer: np.ndarray, seq_length: int) -> None:
    # Any sample with an image longer than a row is itself longer than a row, so none escapes this check.
    too_long = np.flatnonzero(outlines.is_image & (outlines.lengths > seq_length))
    if len(too_long):
        tokens = outlines.lengths[too_long]
        sample = longer[np.searchsorted(outlines.borders, too_long[0], side="right") - 1]
        raise DataError(
            f"an image takes {tokens[0]} tokens, data.seq_length is {seq_length}: no row can hold it",
            where=f"{entry.path} sample {sample}",
            fix=f"raise data.seq_length to {tokens.max()} or more, or set data.overflow=drop",
        )


def _nothing_to_train(entry: BlendEntry, seq_length: int, max_images: int | None) -> ConfigError:
    images = "" if max_images is None else f" and data.max_images_per_row={max_images}"
    return ConfigError(
        f"blend entry {entry.path} has nothing to train: the first token with a loss of every sample is behind the cut "
        f"at data.seq_length={seq_length}{images}",
        fix="raise data.seq_length, or remove the entry",
    )


def _too_long(entry: BlendEntry, seq_length: int, lengths: np.ndarray, number: int) -> DataError:
    worst = int(lengths.argmax())
    return DataError(
        f"{number} samples are longer than data.seq_length={seq_length}; the longest has {int(lengths[worst])} tokens",
        where=f"{entry.path} sample {worst}",
        fix="raise data.seq_length, or set data.overflow to truncate, split or drop",
    )


def _too_many_images(entry: BlendEntry, max_images: int, num_images: np.ndarray, number: int) -> DataError:
    worst = int(num_images.argmax())
    return DataError(
        f"{number} samples have more images than data.max_images_per_row={max_images}; "
        f"the most are {int(num_images[worst])}",
        where=f"{entry.path} sample {worst}",
        fix="raise data.max_images_per_row, or set data.overflow to truncate, split or drop",
    )
