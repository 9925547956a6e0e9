"""Split samples that are too long, or have too many images, never inside an image; no token is lost or repeated.

A fragment takes as many tokens as fit and ends where an image that does not fit begins. The first fragment of a sample
keeps the sample's id; the others have ids of their own after those of all samples of all datasets, in the order of
their samples. (The datasets that a later step of the blend adds come behind them, with their own fragments.) To the
plan, each fragment is a sample: its positions begin at 0, it does not see the other fragments, and its first token has
no loss. One without any label has an id, but no place in a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vlm.data.plan.image_tokens import ImageTokens
from megatron_vlm.data.samples import EncodedSample, ImageSegment, Outlines, TextSegment


@dataclass(frozen=True, slots=True)
class Cuts:
    """All fragments of some samples, in order."""

    owner: np.ndarray
    """int64[fragments]; the sample each belongs to, ascending."""
    first: np.ndarray
    """int64[fragments]; first token within the sample."""
    last: np.ndarray
    """int64[fragments]; token after the last one."""
    num_images: np.ndarray
    """int64[fragments]."""
    image_lengths: np.ndarray
    """int64[fragments]; tokens of these images."""
    num_labels: np.ndarray
    """int64[fragments]; tokens with a loss, of which the first token of a fragment is none."""


def find_cuts(outlines: Outlines, max_tokens: int, *, first_only: bool = False, max_images: int | None = None) -> Cuts:
    """Split samples into fragments of at most `max_tokens` tokens and `max_images` images.

    Args:
        outlines: the segments of the samples.
        max_tokens: longest fragment.
        first_only: return only the first fragment of each sample; it is empty if the sample begins with an image that
            is too long.
        max_images: most images of a fragment; it ends where the next one begins. None: any number.

    Raises:
        ValueError: an image is longer than a fragment; not with `first_only`.
    """
    is_image, lengths = outlines.is_image, outlines.lengths
    ends = np.cumsum(lengths, dtype=np.int64)
    sample_borders = np.concatenate([[0], ends])[outlines.borders]
    if first_only:
        owner, first = np.arange(len(sample_borders) - 1), sample_borders[:-1]
        last = _end_fragments(outlines, ends, first, sample_borders[1:], max_tokens, max_images)
    else:
        if (longest := int(lengths[is_image].max(initial=0))) > max_tokens:
            raise ValueError(f"an image of {longest} tokens does not fit in a fragment of {max_tokens}")
        owner, first = _fragment_starts(outlines, sample_borders, ends, max_tokens, max_images)
        last = np.append(first[1:], sample_borders[-1])
    # No fragment ends inside an image, so images can be counted as whole segments.
    segments = np.stack([np.searchsorted(ends, first, "right"), np.searchsorted(ends, last, "right")])
    num_images = np.concatenate([[0], np.cumsum(is_image)])[segments]
    image_tokens = np.concatenate([[0], np.cumsum(np.where(is_image, lengths, 0), dtype=np.int64)])[segments]
    trained = _trained_before(outlines, ends, np.stack([np.minimum(first + 1, last), last]))
    start = sample_borders[owner]
    return Cuts(
        owner,
        first - start,
        last - start,
        num_images[1] - num_images[0],
        image_tokens[1] - image_tokens[0],
        trained[1] - trained[0],
    )


def _fragment_starts(
    outlines: Outlines, sample_borders: np.ndarray, ends: np.ndarray, max_tokens: int, max_images: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sample and the first token of every fragment, with tokens numbered over all samples."""
    position, stop = sample_borders[:-1].copy(), sample_borders[1:]
    owners, firsts = [np.arange(len(position))], [position.copy()]
    left = np.arange(len(position))
    # Each round cuts one fragment off every sample that is still too long.
    while left.size:
        cut = _end_fragments(outlines, ends, position[left], stop[left], max_tokens, max_images)
        goes_on = cut < stop[left]
        left, cut = left[goes_on], cut[goes_on]
        position[left] = cut
        owners.append(left)
        firsts.append(cut)
    owner, first = np.concatenate(owners), np.concatenate(firsts)
    order = np.argsort(first, kind="stable")
    return owner[order], first[order]


def _end_fragments(
    outlines: Outlines,
    ends: np.ndarray,
    first: np.ndarray,
    stop: np.ndarray,
    max_tokens: int,
    max_images: int | None,
) -> np.ndarray:
    """Return the ends of the longest fragments from `first` on, in samples that end at `stop`."""
    cut = np.minimum(first + max_tokens, stop)
    if max_images is not None:
        # No fragment reaches behind all images, so the last entry limits none.
        starts = np.append((ends - outlines.lengths)[outlines.is_image], ends[-1])
        next_image = np.searchsorted(starts[:-1], first) + max_images
        cut = np.minimum(cut, starts[np.minimum(next_image, len(starts) - 1)])
    # An end inside an image moves to the image's beginning.
    segment = np.searchsorted(ends, cut)
    inside_image = outlines.is_image[segment] & (ends[segment] > cut)
    return np.where(inside_image, ends[segment] - outlines.lengths[segment], cut)


def _trained_before(outlines: Outlines, ends: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return how many tokens that are trained on stand before each position, numbered over all samples."""
    trained = np.where(outlines.is_trained, outlines.lengths, 0)
    segment = np.minimum(np.searchsorted(ends, positions, "right"), len(ends) - 1)
    # The segment begins at or before the position, and the rest of it does not count.
    rest = np.where(outlines.is_trained[segment], ends[segment] - positions, 0)
    return np.cumsum(trained, dtype=np.int64)[segment] - rest


class FragmentTable:
    """Which tokens of which sample the ids of a plan mean.

    Args:
        table: int64[3, fragments]; sample, first token and the token after the last one of the fragments with ids of
            their own, ascending.
        samples: begin and end of each range of ids of samples, ascending; the ids between and behind them belong to
            fragments.
    """

    def __init__(self, table: np.ndarray, samples: Sequence[tuple[int, int]]) -> None:
        self.table = table
        self._begins, self._ends = np.array(samples, dtype=np.int64).T
        self._num_samples = np.cumsum(self._ends - self._begins)

    def find(self, sample_id: int) -> tuple[int, int, int | None]:
        """Return the sample, the first token, and the token after the last one; None means the end of the sample."""
        place = int(np.searchsorted(self._begins, sample_id, side="right")) - 1
        if sample_id >= self._ends[place]:
            sample, first, last = self.table[:, sample_id - self._num_samples[place]].tolist()
            return sample, first, last
        place = int(np.searchsorted(self.table[0], sample_id))
        if place < self.table.shape[1] and self.table[0, place] == sample_id:
            return sample_id, 0, int(self.table[1, place])
        return sample_id, 0, None


def take_fragment(sample: EncodedSample, first: int, last: int, image_tokens: ImageTokens) -> EncodedSample:
    """Return the tokens [first, last) of a sample.

    Raises:
        ValueError: the fragment begins or ends inside an image, or ends after the sample.
    """
    kept: list[TextSegment | ImageSegment] = []
    position = 0
    for segment in sample.segments:
        size = image_tokens.of_segment(segment)
        begin, end = max(first - position, 0), min(last - position, size)
        position += size
        if begin >= end:
            continue
        if isinstance(segment, TextSegment):
            kept.append(TextSegment(segment.input_ids[begin:end], segment.train))
        elif (begin, end) == (0, size):
            kept.append(segment)
        else:
            raise ValueError(f"tokens {first} to {last} end inside an image")
    if last > position:
        raise ValueError(f"the sample has {position} tokens, its fragment ends at {last}")
    return EncodedSample(tuple(kept))
