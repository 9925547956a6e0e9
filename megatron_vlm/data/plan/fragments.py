"""Split samples longer than a row into fragments, never inside an image, so that no token is lost or repeated.

A fragment takes as many tokens as fit and ends where an image that does not fit begins. The first fragment of a sample
keeps the sample's id; the others have ids of their own after those of all samples of all datasets, in the order of
their samples. To the plan, each fragment is a sample: its positions begin at 0, it does not see the other fragments,
and its first token has no loss.
"""

from dataclasses import dataclass

import numpy as np

from megatron_vlm.data.plan.image_tokens import ImageTokens
from megatron_vlm.data.plan.outlines import Outlines
from megatron_vlm.data.samples import EncodedSample, ImageSegment, TextSegment


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


def find_cuts(outlines: Outlines, max_tokens: int, *, first_only: bool = False) -> Cuts:
    """Split samples into fragments of at most `max_tokens` tokens.

    Args:
        outlines: the segments of the samples.
        max_tokens: longest fragment.
        first_only: return only the first fragment of each sample; it is empty if the sample begins with an image that
            is too long.

    Raises:
        ValueError: an image is longer than a fragment; not with `first_only`.
    """
    is_image, lengths = outlines.is_image, outlines.lengths
    ends = np.cumsum(lengths, dtype=np.int64)
    sample_borders = np.concatenate([[0], ends])[outlines.borders]
    if first_only:
        owner, first = np.arange(len(sample_borders) - 1), sample_borders[:-1]
        last = _end_fragments(outlines, ends, np.minimum(first + max_tokens, sample_borders[1:]))
    else:
        if (longest := int(lengths[is_image].max(initial=0))) > max_tokens:
            raise ValueError(f"an image of {longest} tokens does not fit in a fragment of {max_tokens}")
        owner, first = _fragment_starts(outlines, sample_borders, ends, max_tokens)
        last = np.append(first[1:], sample_borders[-1])
    # No fragment ends inside an image, so images can be counted as whole segments.
    segments = np.stack([np.searchsorted(ends, first, "right"), np.searchsorted(ends, last, "right")])
    num_images = np.concatenate([[0], np.cumsum(is_image)])[segments]
    image_tokens = np.concatenate([[0], np.cumsum(np.where(is_image, lengths, 0), dtype=np.int64)])[segments]
    start = sample_borders[owner]
    return Cuts(owner, first - start, last - start, num_images[1] - num_images[0], image_tokens[1] - image_tokens[0])


def _fragment_starts(
    outlines: Outlines, sample_borders: np.ndarray, ends: np.ndarray, max_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sample and the first token of every fragment, with tokens numbered over all samples."""
    position, stop = sample_borders[:-1].copy(), sample_borders[1:]
    owners, firsts = [np.arange(len(position))], [position.copy()]
    left = np.flatnonzero(stop - position > max_tokens)
    # Each round cuts one fragment off every sample that is still too long.
    while left.size:
        position[left] = cut = _end_fragments(outlines, ends, position[left] + max_tokens)
        owners.append(left)
        firsts.append(cut)
        left = left[stop[left] - cut > max_tokens]
    owner, first = np.concatenate(owners), np.concatenate(firsts)
    order = np.argsort(first, kind="stable")
    return owner[order], first[order]


def _end_fragments(outlines: Outlines, ends: np.ndarray, cut: np.ndarray) -> np.ndarray:
    """Move ends of fragments that are inside an image to the beginning of the image."""
    segment = np.searchsorted(ends, cut)
    inside_image = outlines.is_image[segment] & (ends[segment] > cut)
    return np.where(inside_image, ends[segment] - outlines.lengths[segment], cut)


class FragmentTable:
    """Which tokens of which sample the ids of a plan mean.

    Args:
        table: int64[3, fragments]; sample, first token and the token after the last one of the fragments with ids of
            their own, ascending.
        first_id: id of the first of them: the number of samples of all datasets.
    """

    def __init__(self, table: np.ndarray, first_id: int) -> None:
        self.table, self.first_id = table, first_id

    def find(self, sample_id: int) -> tuple[int, int, int | None]:
        """Return the sample, the first token, and the token after the last one; None means the end of the sample."""
        if sample_id >= self.first_id:
            sample, first, last = self.table[:, sample_id - self.first_id].tolist()
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
