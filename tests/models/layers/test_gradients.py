import pytest
import torch

from megatron_vlm.config import ParallelConfig
from megatron_vlm.models.build import build_model
from megatron_vlm.models.computation import Computation
from megatron_vlm.models.layers.gradients import end_gradient
from tests.support.configs import tiny_model
from tests.support.micro_batches import make_micro_batch

LAYERS = "language_model.decoder.layers"
BELOW = ("vision_model", "vision_projection", "language_model.embedding")


def test_an_ended_gradient_is_zero_at_its_source_and_whole_at_its_input():
    x, source = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    out = end_gradient(x * 2, source)
    out.sum().backward()
    assert torch.equal(out, torch.full((3,), 2.0))
    assert torch.equal(x.grad, torch.full((3,), 2.0))
    assert torch.equal(source.grad, torch.zeros(2))


def test_even_a_tensor_that_needs_no_gradient_sends_one_to_the_source():
    source = torch.ones(2, requires_grad=True)
    end_gradient(torch.ones(3), source).sum().backward()
    assert torch.equal(source.grad, torch.zeros(2))


def gradients(freeze, recompute):
    model = tiny_model()
    torch.manual_seed(0)
    (chunk,) = build_model(model, ParallelConfig(), Computation(recompute=recompute), freeze)
    batch = make_micro_batch(model, num_images=2, num_text=40, num_labels=20)
    chunk(**batch.arguments).sum().backward()
    return {name: parameter.grad for name, parameter in chunk.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    "freeze",
    [
        (),
        ("vision_model",),
        BELOW,
        (*BELOW, f"{LAYERS}.0"),
        (*BELOW, f"{LAYERS}.[0-2]", f"{LAYERS}.3.self_attention"),
        (*BELOW, "language_model.decoder"),
        ("vision_model.[!d]*", "vision_model.decoder.layers.0", "vision_projection", "language_model"),
    ],
    ids=["nothing", "tower", "below", "one_layer", "up_to_an_mlp", "all_but_output", "start_of_the_tower"],
)
def test_recomputation_changes_no_gradient_whatever_is_frozen(freeze, one_rank):
    plain, recomputed = (gradients(freeze, recompute) for recompute in ("none", "full"))
    assert plain.keys() == recomputed.keys()
    for name in plain:
        assert plain[name] is not None, name
        # float32: a recomputed tensor may lie otherwise in memory, and a bias sums its rows in another order.
        torch.testing.assert_close(recomputed[name], plain[name], rtol=1e-5, atol=1e-7)


def test_no_gradient_is_computed_without_autograd(one_rank):
    model = tiny_model()
    (chunk,) = build_model(model, ParallelConfig(), Computation(recompute="full"), BELOW)
    with torch.no_grad():
        loss = chunk(**make_micro_batch(model, num_images=2, num_text=40, num_labels=20).arguments)
    assert not loss.requires_grad
