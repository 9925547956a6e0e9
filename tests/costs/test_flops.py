"""The operations that we count, against those that torch sees in a real forward and backward pass."""

import dataclasses
import itertools

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_vlm.config import PART_NAMES, ParallelConfig
from megatron_vlm.costs.flops import Work, step_flops
from megatron_vlm.models.build import build_model
from megatron_vlm.models.computation import Computation
from tests.support.configs import tiny_model
from tests.support.micro_batches import make_micro_batch
from tests.support.parts import PROJECTOR_NAMES, tiny_projector

FREEZES = [freeze for count in range(len(PART_NAMES)) for freeze in itertools.combinations(PART_NAMES, count)]
WORK = Work(num_tokens=10, attention_pairs=55, num_labels=5, num_images=2)


def counted_by_torch(model, freeze, batch, *, backward=True):
    """Return the matrix products of a step; with the plain kernel attention is products of matrices, too."""
    (chunk,) = build_model(model, ParallelConfig(), Computation(), freeze)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = chunk(**batch.arguments).sum()
        if backward:
            loss.backward()
    return counter.get_total_flops()


def work_of(batch):
    # The plain kernel computes the pairs that the causal mask then takes away.
    return Work(
        num_tokens=batch.num_tokens,
        attention_pairs=batch.num_tokens**2,
        num_labels=batch.num_labels,
        num_images=batch.num_images,
    )


@pytest.mark.parametrize("projection", PROJECTOR_NAMES)
@pytest.mark.parametrize("freeze", FREEZES, ids=lambda freeze: "+".join(freeze) or "nothing")
def test_operations_equal_those_of_a_real_step_whatever_is_frozen(freeze, projection, one_rank):
    model = dataclasses.replace(tiny_model(), projection=tiny_projector(projection))
    batch = make_micro_batch(model, num_images=3, num_text=40, num_labels=20)
    ours = step_flops(model, freeze, work_of(batch)).total
    # Equal but for one product: megatron-core's linear layers compute the gradient of an input that needs none.
    assert ours == pytest.approx(counted_by_torch(model, freeze, batch), rel=0.005)


def test_operations_of_a_forward_pass_equal_those_of_a_model_in_which_nothing_learns(one_rank):
    model = tiny_model()
    batch = make_micro_batch(model, num_images=3, num_text=40, num_labels=20)
    ours = step_flops(model, PART_NAMES, work_of(batch)).total
    assert ours == pytest.approx(counted_by_torch(model, PART_NAMES, batch, backward=False))


def test_padding_costs_nothing_and_images_do():
    flops = step_flops(tiny_model(), (), WORK)
    without = step_flops(tiny_model(), (), dataclasses.replace(WORK, num_images=0))
    assert (without.tower, without.projection) == (0, 0)
    assert (without.layers, without.output) == (flops.layers, flops.output)
    assert flops.total == flops.tower + flops.projection + sum(flops.layers) + flops.output > without.total
