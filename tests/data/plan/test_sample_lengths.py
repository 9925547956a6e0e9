"""Lengths of samples count every image by its size."""

import numpy as np
import pytest

from megatron_vlm.data.plan.image_tokens import ImageTokens
from megatron_vlm.data.plan.sample_lengths import measure_images
from tests.support.lengths import Lengths, make_dataset


def test_images_of_a_sample_are_added_up():
    dataset = make_dataset(50)
    found = measure_images(dataset, ImageTokens(function=lambda width, height: width + 10 * height))
    tokens = (dataset.sizes @ [1, 10]).tolist()
    expected = [sum(tokens.pop(0) for _ in range(number)) for number in dataset.num_images]
    assert (found.lengths.dtype, found.lengths.tolist()) == (np.int32, expected)
    assert found.tokens_per_image == (min(dataset.sizes @ [1, 10]), max(dataset.sizes @ [1, 10]))


@pytest.mark.parametrize("image_tokens", [ImageTokens(7), ImageTokens(function=lambda width, height: 7)])
def test_constant_function_is_the_constant(image_tokens):
    dataset = make_dataset(50)
    found = measure_images(dataset, image_tokens)
    assert found.lengths.tolist() == (7 * dataset.num_images).tolist()
    assert found.tokens_per_image == (7, 7)


def test_dataset_without_images_has_no_range_of_a_function():
    found = measure_images(Lengths([0, 0], [3, 4]), ImageTokens(function=lambda width, height: width))
    assert (found.lengths.tolist(), found.tokens_per_image) == ([0, 0], None)
