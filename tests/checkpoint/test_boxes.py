from itertools import combinations
from math import prod

import pytest
import torch

from megatron_vlm.checkpoint.boxes import split_flat_range


@pytest.mark.parametrize("shape", [(), (1,), (7,), (4, 5), (3, 1), (1, 6), (2, 3, 4), (2, 2, 3, 2)])
def test_boxes_are_the_range_in_its_order(shape):
    whole = torch.arange(prod(shape)).view(shape)
    for begin, end in combinations(range(prod(shape) + 1), 2):
        boxes = list(split_flat_range(shape, begin, end))
        parts = [whole[tuple(slice(o, o + n) for o, n in zip(b.offsets, b.sizes, strict=True))] for b in boxes]
        assert torch.cat([part.flatten() for part in parts]).tolist() == list(range(begin, end))
        assert [(box.begin, box.end) for box in boxes] == [
            (int(part.flatten()[0]), int(part.flatten()[-1]) + 1) for part in parts
        ]
        assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_an_empty_range_has_no_box():
    assert list(split_flat_range((4, 5), 3, 3)) == []
