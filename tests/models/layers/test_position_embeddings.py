import pytest
import torch

from megatron_vlm.models.layers.position_embeddings import PositionEmbeddings, Resizable, resize_positions
from megatron_vlm.platform.device import set_deterministic


@pytest.fixture
def afterwards_as_before():
    yield
    set_deterministic(False)


def test_the_table_of_the_same_grid_is_not_touched():
    embeddings = PositionEmbeddings(4, 1, 8, torch.float32)
    assert embeddings(4, 4) is embeddings.weight


def test_interpolated_positions_keep_rows_and_columns_apart():
    embeddings = PositionEmbeddings(4, 1, 8, torch.float32)
    with torch.no_grad():
        embeddings.weight[0] = 0.0
        embeddings.weight[1:] = torch.arange(4.0).repeat_interleave(4)[:, None]  # the row number of every patch
        other = embeddings(2, 8)
    rows = other[1:, 0].view(2, 8)
    torch.testing.assert_close(rows, rows[:, :1].expand(2, 8))  # alike along a row
    assert rows[0, 0] < rows[1, 0]


def test_the_position_of_the_class_token_is_not_interpolated():
    embeddings = PositionEmbeddings(4, 1, 8, torch.float32)
    assert torch.equal(embeddings(5, 3)[0], embeddings.weight[0])
    assert embeddings(5, 3).shape == (16, 8)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(5, 5), (11, 3), (7, 16)])
def test_deterministic_training_interpolates_alike(rows, columns, antialias, afterwards_as_before):
    table, direction, found = torch.randn(49, 8, requires_grad=True), torch.randn(rows * columns, 8), []
    for deterministic in (False, True):
        set_deterministic(deterministic)
        resized = resize_positions(table, 7, rows, columns, antialias=antialias)
        found.append((resized, *torch.autograd.grad(resized, table, direction)))
    assert [_is_interpolated(resized) for resized, _ in found] == [True, False]
    # float32: the filter in one step, and in two as products
    torch.testing.assert_close(*found, rtol=1e-5, atol=2e-6)


def _is_interpolated(tensor):
    """Return whether torch's own interpolation is among the operations whose gradient the tensor has."""
    nodes = [tensor.grad_fn]
    for node in nodes:
        nodes.extend(before for before, _ in node.next_functions if before is not None)
    return any("Upsample" in node.name() for node in nodes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_positions_stay_constant(dtype):
    table = torch.full((16, 8), 0.75, dtype=dtype)
    # weights of the filter sum to 1 up to rounding
    torch.testing.assert_close(resize_positions(table, 4, 6, 6), torch.full((36, 8), 0.75, dtype=dtype))


def test_antialiasing_averages_what_a_smaller_grid_would_skip():
    table = torch.eye(64)[10:11].T  # one patch of 8 x 8 differs
    plain, smooth = (resize_positions(table, 8, 2, 2, antialias=antialias) for antialias in (False, True))
    assert (plain - smooth).abs().max() > 0.01
    torch.testing.assert_close(smooth.sum() * 16, torch.ones(()), atol=0.2, rtol=0)


def test_the_gradient_reaches_the_table():
    embeddings = PositionEmbeddings(4, 1, 8, torch.float32)
    embeddings(3, 3).sum().backward()
    torch.testing.assert_close(embeddings.weight.grad.sum(dim=0), torch.full((8,), 10.0))


def test_interpolation_is_that_of_hugging_face():
    dinov2 = pytest.importorskip("transformers.models.dinov2.modeling_dinov2")
    config = dinov2.Dinov2Config(hidden_size=8, image_size=32, patch_size=8, num_attention_heads=2)
    embeddings = dinov2.Dinov2Embeddings(config)
    table = torch.randn(1, 17, 8)
    embeddings.position_embeddings.data.copy_(table)
    theirs = embeddings.interpolate_pos_encoding(torch.zeros(1, 13, 8), 24, 32)
    assert torch.equal(resize_positions(table[0, 1:], 4, 3, 4), theirs[0, 1:])


@pytest.mark.parametrize(
    ("shape", "fits"),
    [((10, 8), True), ((2, 8), True), ((11, 8), False), ((1, 8), False), ((0, 8), False), ((10, 9), False)],
)
def test_a_table_of_a_square_and_a_class_token_can_be_resized(shape, fits):
    table = PositionEmbeddings(4, 1, 8, torch.float32)
    assert isinstance(table, Resizable)
    assert table.can_resize(shape) is fits


def test_a_table_is_resized_in_float32_and_takes_the_type_of_the_model():
    table = PositionEmbeddings(4, 1, 8, torch.bfloat16)
    stored = torch.randn(10, 8)
    resized = table.resize(stored)
    assert resized.dtype == torch.bfloat16
    assert torch.equal(resized[0], stored[0].bfloat16())
    assert torch.equal(resized[1:], resize_positions(stored[1:], 3, 4, 4).bfloat16())
