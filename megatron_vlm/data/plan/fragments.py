"""Cut samples that are longer than a row into pieces, none inside an image, so that no token is lost or repeated.

A piece takes as many tokens as fit and ends where an image that does not fit begins. The first piece of a sample keeps
the sample's id; the others have ids of their own behind those of all samples of all datasets, in the order of their
samples. Each piece is a sample of the plan: its positions begin at 0, it does not see the other pieces, and its first
token has no loss.
"""

from dataclasses import dataclass

import numpy as np

from megatron_vlm.data.samples import EncodedSample, ImageSegment, TextSegment


@dataclass(frozen=True, slots=True)
class Cuts:
    """All pieces of some samples, in order."""

    owner: np.ndarray
    """int64[pieces]; which of the samples each belongs to, ascending."""
    first: np.ndarray
    """int64[pieces]; its first token in the sample."""
    last: np.ndarray
    """int64[pieces]; the token behind its last one."""
    num_images: np.ndarray
    """int64[pieces]."""


def find_cuts(
    borders: np.ndarray, is_image: np.ndarray, text_lengths: np.ndarray, max_tokens: int, num_image_tokens: int
) -> Cuts:
    """Cut samples into pieces of at most `max_tokens` tokens.

    Args:
        borders: int64[samples + 1]; segments of each sample, at least one.
        is_image: bool[segments]; in reading order.
        text_lengths: int[segments]; 0 for images [tokens].
        max_tokens: longest piece.
        num_image_tokens: tokens of an image.

    Raises:
        ValueError: an image is longer than a piece.
    """
    if num_image_tokens > max_tokens and is_image.any():
        raise ValueError(f"an image of {num_image_tokens} tokens does not fit in a piece of {max_tokens}")
    ends = np.cumsum(np.where(is_image, num_image_tokens, text_lengths), dtype=np.int64)
    sample_borders = np.concatenate([[0], ends])[borders]
    position, stop = sample_borders[:-1].copy(), sample_borders[1:]
    owners, firsts = [np.arange(len(position))], [position.copy()]
    left = np.flatnonzero(stop - position > max_tokens)
    # As many rounds as the longest sample has pieces; a round takes one piece of every sample that is still too long.
    while left.size:
        cut = position[left] + max_tokens
        segment = np.searchsorted(ends, cut)
        inside_image = is_image[segment] & (ends[segment] > cut)
        cut = np.where(inside_image, ends[segment] - num_image_tokens, cut)
        owners.append(left)
        firsts.append(cut)
        position[left] = cut
        left = left[stop[left] - cut > max_tokens]
    owner, first = np.concatenate(owners), np.concatenate(firsts)
    order = np.argsort(first, kind="stable")
    owner, first = owner[order], first[order]
    last = np.append(first[1:], sample_borders[-1])
    images_before = np.concatenate([[0], np.cumsum(is_image)])
    num_images = (
        images_before[np.searchsorted(ends, last, "right")] - images_before[np.searchsorted(ends, first, "right")]
    )
    start = sample_borders[owner]
    return Cuts(owner, first - start, last - start, num_images)


class PieceTable:
    """Which tokens of which sample the ids of a plan stand for.

    Args:
        table: int64[3, pieces]; sample, first token and the token behind the last one of the pieces with ids of their
            own, ascending.
        first_id: id of the first of them: the number of samples of all datasets.
    """

    def __init__(self, table: np.ndarray, first_id: int) -> None:
        self.table, self.first_id = table, first_id

    def find(self, sample_id: int) -> tuple[int, int, int | None]:
        """Return the sample, the first token, and the token behind the last one, None for the end of the sample."""
        if sample_id >= self.first_id:
            sample, first, last = self.table[:, sample_id - self.first_id].tolist()
            return sample, first, last
        place = int(np.searchsorted(self.table[0], sample_id))
        if place < self.table.shape[1] and self.table[0, place] == sample_id:
            return sample_id, 0, int(self.table[1, place])
        return sample_id, 0, None


def take_piece(sample: EncodedSample, first: int, last: int, num_image_tokens: int) -> EncodedSample:
    """Return the tokens [first, last) of a sample.

    Raises:
        ValueError: the piece has an end inside an image or behind the end of the sample.
    """
    kept: list[TextSegment | ImageSegment] = []
    position = 0
    for segment in sample.segments:
        size = num_image_tokens if isinstance(segment, ImageSegment) else len(segment.input_ids)
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
        raise ValueError(f"the sample has {position} tokens, its piece ends at {last}")
    return EncodedSample(tuple(kept))
