"""The fragments of a long sample are the sample, and no image is cut."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlm.data.plan.fragments import FragmentTable, find_cuts, take_fragment
from megatron_vlm.data.plan.image_tokens import ImageTokens
from megatron_vlm.data.samples import EncodedSample, ImageSegment, Outlines, TextSegment

IMAGE_TOKENS = 16
CONSTANT = ImageTokens(IMAGE_TOKENS)
BY_SIZE = ImageTokens(function=lambda width, height: width + height, identity="sum")

text = st.integers(1, 90).map(lambda size: TextSegment(np.arange(size, dtype=np.int32), bool(size % 2)))
images = st.tuples(st.integers(0, 255), st.integers(1, 8), st.integers(1, 8)).map(
    lambda values: ImageSegment(bytes(values), values[1:])
)
samples = st.lists(st.one_of(images, text), min_size=1, max_size=12).map(lambda parts: EncodedSample(tuple(parts)))
both = pytest.mark.parametrize("image_tokens", [CONSTANT, BY_SIZE], ids=["constant", "by size"])


def outline(batch: list[EncodedSample], image_tokens: ImageTokens = CONSTANT) -> Outlines:
    flat = [segment for sample in batch for segment in sample.segments]
    is_image = np.array([isinstance(segment, ImageSegment) for segment in flat])
    tokens = [image_tokens.of_image(one.size) if isinstance(one, ImageSegment) else len(one.input_ids) for one in flat]
    is_trained = np.array([isinstance(segment, TextSegment) and segment.train for segment in flat])
    return Outlines(np.cumsum([0, *(len(sample.segments) for sample in batch)]), is_image, is_trained, np.array(tokens))


def contents(sample: EncodedSample) -> list:
    """One entry a token with whether it is trained, one an image."""
    found = []
    for segment in sample.segments:
        if isinstance(segment, ImageSegment):
            found.append(segment.encoded)
        else:
            found += [(token, segment.train) for token in segment.input_ids.tolist()]
    return found


def length(sample: EncodedSample, image_tokens: ImageTokens) -> int:
    return sum(
        image_tokens.of_image((entry[1], entry[2])) if isinstance(entry, bytes) else 1 for entry in contents(sample)
    )


@both
@given(
    batch=st.lists(samples, min_size=1, max_size=4),
    limit=st.integers(IMAGE_TOKENS, 120),
    most=st.none() | st.integers(1, 4),
)
def test_fragments_one_after_the_other_are_the_sample(image_tokens, batch, limit, most):
    cuts = find_cuts(outline(batch, image_tokens), limit, max_images=most)
    assert most is None or cuts.num_images.max() <= most
    for number, sample in enumerate(batch):
        own = np.flatnonzero(cuts.owner == number)
        fragments = [take_fragment(sample, cuts.first[i], cuts.last[i], image_tokens) for i in own]
        assert sum((contents(fragment) for fragment in fragments), []) == contents(sample)
        assert all(0 < length(fragment, image_tokens) <= limit for fragment in fragments)
        found = [[entry for entry in contents(fragment) if isinstance(entry, bytes)] for fragment in fragments]
        assert [len(entries) for entries in found] == cuts.num_images[own].tolist()
        tokens = [sum(image_tokens.of_image((entry[1], entry[2])) for entry in entries) for entries in found]
        assert tokens == cuts.image_lengths[own].tolist()
        # An image begins with a token that has no loss, so only a text in front can lose its first label.
        labels = [
            sum(entry[1] for entry in contents(fragment)[1:] if isinstance(entry, tuple)) for fragment in fragments
        ]
        assert labels == cuts.num_labels[own].tolist()


@both
@given(batch=st.lists(samples, min_size=1, max_size=4), limit=st.integers(IMAGE_TOKENS, 120))
def test_nothing_that_follows_would_fit_in_a_fragment(image_tokens, batch, limit):
    cuts = find_cuts(outline(batch, image_tokens), limit)
    for number, sample in enumerate(batch):
        own = np.flatnonzero(cuts.owner == number)
        for fragment in own[:-1]:
            behind = take_fragment(sample, cuts.last[fragment], cuts.last[own[-1]], image_tokens).segments[0]
            next_size = image_tokens.of_image(behind.size) if isinstance(behind, ImageSegment) else 1
            assert cuts.last[fragment] - cuts.first[fragment] + next_size > limit


def test_image_longer_than_a_fragment_is_refused():
    batch = [EncodedSample((ImageSegment(b"x"),))]
    with pytest.raises(ValueError, match="image of 16 tokens does not fit in a fragment of 15"):
        find_cuts(outline(batch), 15)


def test_text_may_be_cut_where_an_image_would_not_fit():
    cuts = find_cuts(outline([EncodedSample((TextSegment(np.zeros(20, dtype=np.int32), True),))]), 15)
    assert (cuts.first.tolist(), cuts.last.tolist()) == ([0, 15], [15, 20])


def test_table_knows_which_tokens_an_id_stands_for():
    # Samples 3 and 7 of 10 are split, the second into three.
    table = FragmentTable(np.array([[3, 7, 7], [60, 64, 120], [80, 120, 130]]), samples=[(0, 10)])
    assert [table.find(number) for number in (2, 3, 4, 7, 9)] == [
        (2, 0, None),
        (3, 0, 60),
        (4, 0, None),
        (7, 0, 64),
        (9, 0, None),
    ]
    assert [table.find(number) for number in (10, 11, 12)] == [(3, 60, 80), (7, 64, 120), (7, 120, 130)]


def test_empty_table_leaves_samples_whole():
    assert FragmentTable(np.empty((3, 0), dtype=np.int64), samples=[(0, 5)]).find(4) == (4, 0, None)


@pytest.mark.parametrize(("first", "last"), [(0, 8), (8, 20), (5, 12)])
def test_fragment_that_ends_inside_an_image_is_refused(first, last):
    sample = EncodedSample((ImageSegment(b"x"), TextSegment(np.zeros(9, dtype=np.int32), True)))
    with pytest.raises(ValueError, match="inside an image"):
        take_fragment(sample, first, last, CONSTANT)


def test_fragment_behind_the_end_is_refused():
    sample = EncodedSample((TextSegment(np.zeros(9, dtype=np.int32), True),))
    with pytest.raises(ValueError, match="has 9 tokens, its fragment ends at 10"):
        take_fragment(sample, 4, 10, CONSTANT)


def test_table_tells_the_fragments_of_each_group_of_datasets_from_its_samples():
    # Samples 0 to 3 with fragment 4, then samples 5 to 6 with fragments 7 and 8.
    table = FragmentTable(np.array([[2, 6, 6], [10, 20, 30], [15, 30, 35]]), samples=[(0, 4), (5, 7)])
    found = [table.find(number) for number in (2, 3, 4, 5, 6, 7, 8)]
    assert found == [(2, 0, 10), (3, 0, None), (2, 10, 15), (5, 0, None), (6, 0, 20), (6, 20, 30), (6, 30, 35)]
