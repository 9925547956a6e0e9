"""The pieces of a long sample are the sample, and no image is cut."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlm.data.plan.fragments import PieceTable, find_cuts, take_piece
from megatron_vlm.data.samples import EncodedSample, ImageSegment, TextSegment

IMAGE_TOKENS = 16

text = st.integers(1, 90).map(lambda size: TextSegment(np.arange(size, dtype=np.int32), bool(size % 2)))
images = st.integers(0, 255).map(lambda value: ImageSegment(bytes([value])))
samples = st.lists(st.one_of(images, text), min_size=1, max_size=12).map(lambda parts: EncodedSample(tuple(parts)))


def outline(batch: list[EncodedSample]):
    flat = [segment for sample in batch for segment in sample.segments]
    is_image = np.array([isinstance(segment, ImageSegment) for segment in flat])
    tokens = np.array([0 if isinstance(segment, ImageSegment) else len(segment.input_ids) for segment in flat])
    return np.cumsum([0, *(len(sample.segments) for sample in batch)]), is_image, tokens


def contents(sample: EncodedSample) -> list:
    """One entry a token with whether it is trained, one an image."""
    found = []
    for segment in sample.segments:
        if isinstance(segment, ImageSegment):
            found.append(segment.encoded)
        else:
            found += [(token, segment.train) for token in segment.input_ids.tolist()]
    return found


def length(sample: EncodedSample) -> int:
    return sum(IMAGE_TOKENS if isinstance(entry, bytes) else 1 for entry in contents(sample))


@given(batch=st.lists(samples, min_size=1, max_size=4), limit=st.integers(IMAGE_TOKENS, 120))
def test_pieces_one_after_the_other_are_the_sample(batch, limit):
    cuts = find_cuts(*outline(batch), limit, IMAGE_TOKENS)
    for number, sample in enumerate(batch):
        own = np.flatnonzero(cuts.owner == number)
        pieces = [take_piece(sample, cuts.first[i], cuts.last[i], IMAGE_TOKENS) for i in own]
        assert sum((contents(piece) for piece in pieces), []) == contents(sample)
        assert all(0 < length(piece) <= limit for piece in pieces)
        found = [sum(isinstance(entry, bytes) for entry in contents(piece)) for piece in pieces]
        assert found == cuts.num_images[own].tolist()


@given(batch=st.lists(samples, min_size=1, max_size=4), limit=st.integers(IMAGE_TOKENS, 120))
def test_nothing_that_follows_would_fit_in_a_piece(batch, limit):
    cuts = find_cuts(*outline(batch), limit, IMAGE_TOKENS)
    for number, sample in enumerate(batch):
        own = np.flatnonzero(cuts.owner == number)
        for piece in own[:-1]:
            behind = take_piece(sample, cuts.last[piece], cuts.last[own[-1]], IMAGE_TOKENS).segments[0]
            next_size = IMAGE_TOKENS if isinstance(behind, ImageSegment) else 1
            assert cuts.last[piece] - cuts.first[piece] + next_size > limit


def test_image_longer_than_a_piece_is_refused():
    batch = [EncodedSample((ImageSegment(b"x"),))]
    with pytest.raises(ValueError, match="image of 16 tokens does not fit in a piece of 15"):
        find_cuts(*outline(batch), 15, IMAGE_TOKENS)


def test_text_may_be_cut_where_an_image_would_not_fit():
    cuts = find_cuts(*outline([EncodedSample((TextSegment(np.zeros(20, dtype=np.int32), True),))]), 15, IMAGE_TOKENS)
    assert (cuts.first.tolist(), cuts.last.tolist()) == ([0, 15], [15, 20])


def test_table_knows_which_tokens_an_id_stands_for():
    # Samples 3 and 7 of 10 are split, the second into three.
    table = PieceTable(np.array([[3, 7, 7], [60, 64, 120], [80, 120, 130]]), first_id=10)
    assert [table.find(number) for number in (2, 3, 4, 7, 9)] == [
        (2, 0, None),
        (3, 0, 60),
        (4, 0, None),
        (7, 0, 64),
        (9, 0, None),
    ]
    assert [table.find(number) for number in (10, 11, 12)] == [(3, 60, 80), (7, 64, 120), (7, 120, 130)]


def test_empty_table_leaves_samples_whole():
    assert PieceTable(np.empty((3, 0), dtype=np.int64), first_id=5).find(4) == (4, 0, None)


@pytest.mark.parametrize(("first", "last"), [(0, 8), (8, 20), (5, 12)])
def test_piece_that_ends_inside_an_image_is_refused(first, last):
    sample = EncodedSample((ImageSegment(b"x"), TextSegment(np.zeros(9, dtype=np.int32), True)))
    with pytest.raises(ValueError, match="inside an image"):
        take_piece(sample, first, last, IMAGE_TOKENS)


def test_piece_behind_the_end_is_refused():
    sample = EncodedSample((TextSegment(np.zeros(9, dtype=np.int32), True),))
    with pytest.raises(ValueError, match="has 9 tokens, its piece ends at 10"):
        take_piece(sample, 4, 10, IMAGE_TOKENS)
