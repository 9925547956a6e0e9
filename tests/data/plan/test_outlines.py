"""The plan cuts samples where collating cuts them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlm.data.loading.collate import cut_sample
from megatron_vlm.data.plan.fragments import find_cuts
from megatron_vlm.data.plan.image_tokens import ImageTokens
from megatron_vlm.data.plan.outlines import read_outlines
from megatron_vlm.data.samples import EncodedSample, ImageSegment, Outlines, TextSegment
from tests.support.lengths import make_dataset

AREA = ImageTokens(function=lambda width, height: width * height, identity="area")

images = st.tuples(st.integers(1, 6), st.integers(1, 6)).map(lambda size: ImageSegment(b"x", size))
texts = st.tuples(st.integers(1, 40), st.booleans()).map(
    lambda values: TextSegment(np.zeros(values[0], dtype=np.int32), values[1])
)


@pytest.mark.parametrize("image_tokens", [ImageTokens(16), AREA], ids=["constant", "by size"])
@given(
    samples=st.lists(st.lists(st.one_of(images, texts), min_size=1, max_size=8), min_size=1, max_size=5),
    limit=st.integers(0, 120),
    most=st.none() | st.integers(1, 3),
)
def test_plan_cuts_where_the_batch_is_cut(image_tokens, samples, limit, most):
    expected = []
    for sample in samples:
        kept = cut_sample(EncodedSample(tuple(sample)), limit, image_tokens, most).segments
        image_lengths = [image_tokens.of_image(one.size) for one in kept if isinstance(one, ImageSegment)]
        tokens = sum(len(segment.input_ids) for segment in kept if isinstance(segment, TextSegment))
        trained = [
            isinstance(segment, TextSegment) and segment.train
            for segment in kept
            for _ in range(len(segment.input_ids) if isinstance(segment, TextSegment) else 1)
        ]
        expected.append((sum(image_lengths) + tokens, len(image_lengths), sum(image_lengths), sum(trained[1:])))
    flat = [segment for sample in samples for segment in sample]
    outlines = Outlines(
        borders=np.cumsum([0, *map(len, samples)]),
        is_image=np.array([isinstance(segment, ImageSegment) for segment in flat]),
        is_trained=np.array([isinstance(segment, TextSegment) and segment.train for segment in flat]),
        lengths=np.array(
            [image_tokens.of_image(one.size) if isinstance(one, ImageSegment) else len(one.input_ids) for one in flat]
        ),
    )
    found = find_cuts(outlines, limit, first_only=True, max_images=most)
    columns = (found.last, found.num_images, found.image_lengths, found.num_labels)
    assert list(zip(*(values.tolist() for values in columns), strict=True)) == expected


@pytest.mark.parametrize("image_tokens", [ImageTokens(16), AREA], ids=["constant", "by size"])
def test_outlines_have_the_tokens_of_every_image(image_tokens):
    dataset, chosen = make_dataset(40), np.array([0, 3, 4, 17, 39])
    outlines = read_outlines(dataset, chosen, image_tokens)
    first_image = np.cumsum(dataset.num_images) - dataset.num_images
    for place, sample in enumerate(chosen):
        own = outlines.lengths[outlines.borders[place] : outlines.borders[place + 1]]
        sizes = dataset.sizes[first_image[sample] :][: dataset.num_images[sample]].tolist()
        assert own.tolist() == [dataset.text_lengths[sample], *(image_tokens.of_image(tuple(size)) for size in sizes)]
