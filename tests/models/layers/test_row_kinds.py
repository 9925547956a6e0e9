import pytest
import torch

from megatron_vlm.models.layers.row_kinds import sort_rows


@pytest.mark.parametrize("image_rows", [[], [0], [5, 0, 3], [0, 1, 2, 3, 4, 5]])
def test_rows_are_split_by_kind_in_order_and_joined_in_their_places(image_rows):
    x = torch.arange(12.0).view(6, 2)
    rows = sort_rows(torch.tensor(image_rows, dtype=torch.int64), 6)
    text, image = rows.split(x)
    assert torch.equal(image, x[sorted(image_rows)])
    assert torch.equal(text, x[[row for row in range(6) if row not in image_rows]])
    assert torch.equal(rows.join(text, image), x)


def test_gradients_find_their_rows():
    x = torch.arange(8.0).view(4, 2).requires_grad_()
    rows = sort_rows(torch.tensor([1, 2]), 4)
    text, image = rows.split(x)
    rows.join(text, 3 * image).sum().backward()
    assert torch.equal(x.grad, torch.tensor([[1.0, 1], [3, 3], [3, 3], [1, 1]]))
