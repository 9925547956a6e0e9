"""What holds for every projection, the ones to come included."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_vlm.config.grid import Grid
from tests.support.configs import tiny_run
from tests.support.jobs import train_steps
from tests.support.parts import PROJECTOR_NAMES, tiny_model_of, tiny_projector
from tests.support.projectors import INPUT_SIZE, NUM_IMAGES, OUTPUT_SIZE, build

GRIDS = [Grid(4, 4), Grid(3, 5)]
ROWS = [[0, 1], [2, 3], [4, 5], [6, 7]] * 2


@pytest.mark.parametrize("patches", GRIDS, ids=str)
@pytest.mark.parametrize("type", PROJECTOR_NAMES)
def test_tokens_and_parameters_are_those_of_the_settings(type, patches, one_rank):
    config, module = tiny_projector(type), build(type, patches)
    assert module(torch.randn(2, patches.size, INPUT_SIZE)).shape == (2, config.token_grid(patches).size, OUTPUT_SIZE)
    found = {name: parameter.numel() for name, parameter in module.named_parameters()}
    assert config.parameter_sizes(INPUT_SIZE, OUTPUT_SIZE) == found


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("patches", GRIDS, ids=str)
@pytest.mark.parametrize("type", PROJECTOR_NAMES)
def test_operations_are_those_that_torch_counts(type, patches, learns, one_rank):
    module = build(type, patches).requires_grad_(learns)
    features = torch.randn(NUM_IMAGES, patches.size, INPUT_SIZE, requires_grad=True)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module(features).sum().backward()
    config = tiny_projector(type)
    counted = config.operations(patches, INPUT_SIZE, OUTPUT_SIZE).training(learns=learns, input_gradient=True)
    assert counted * NUM_IMAGES == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("type", PROJECTOR_NAMES)
def test_in_bf16_it_rounds_but_computes_the_same(type, one_rank):
    features = torch.randn(2, 16, INPUT_SIZE)
    exact, rounded = build(type, GRIDS[0]), build(type, GRIDS[0], precision="bf16")
    for parameter, other in zip(exact.parameters(), rounded.parameters(), strict=True):
        parameter.data.copy_(other)
    found = rounded(features.bfloat16())
    assert found.dtype == torch.bfloat16
    expected = exact(features.bfloat16().float())
    # bf16 has 8 bits: each layer rounds by up to 0.4 % of its largest values.
    assert (found.float() - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize("frozen", [(), ("vision_model", "language_model"), ("vision_projection",)])
@pytest.mark.parametrize("type", PROJECTOR_NAMES)
def test_it_learns_unless_it_is_frozen(type, frozen, one_rank, tmp_path):
    config = tiny_run(str(tmp_path), model=tiny_model_of(projector=type), training={"freeze": frozen})
    steps = train_steps(config, ROWS, num_samples=8, num_steps=2)
    assert steps.losses[1] < steps.losses[0]


@pytest.mark.distributed
@pytest.mark.parametrize("type", PROJECTOR_NAMES)
def test_two_tensor_parallel_ranks_train_like_one(type, workers, tmp_path):
    config = tiny_run(str(tmp_path), model=tiny_model_of(projector=type))
    split = dataclasses.replace(config.parallel, tensor_model_parallel_size=2, sequence_parallel=True)
    one, two = (
        workers.run(
            "tests.support.jobs:train_steps",
            parallel.tensor_model_parallel_size,
            config=dataclasses.replace(config, parallel=parallel),
            rows=ROWS,
            num_samples=8,
            num_steps=2,
        )[0]
        for parallel in (config.parallel, split)
    )
    # float32: sums in another order
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    assert two.grad_norms == pytest.approx(one.grad_norms, rel=1e-5)
