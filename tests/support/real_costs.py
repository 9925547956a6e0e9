"""What the settings say about costs, against a real model and a real step."""

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_vlm.config import TrainConfig
from megatron_vlm.costs.flops import Work, step_flops
from megatron_vlm.costs.parameters import stage_sizes
from megatron_vlm.models.build import build_model
from megatron_vlm.models.computation import Computation
from tests.support.micro_batches import make_micro_batch


def assert_costs_are_real(config: TrainConfig, freeze: tuple[str, ...] = ()) -> None:
    """Compare parameters and operations with those of a real model and a real step."""
    (chunk,) = build_model(config.model, config.parallel, Computation(), freeze)
    (size,) = stage_sizes(config)
    assert size.parameters == sum(parameter.numel() for parameter in chunk.parameters())
    assert size.learning == sum(p.numel() for p in chunk.parameters() if p.requires_grad)
    batch = make_micro_batch(config.model, num_images=3, num_text=40, num_labels=20)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        chunk(**batch.arguments).sum().backward()
    work = Work(
        num_tokens=batch.num_tokens,
        attention_pairs=batch.num_tokens**2,
        num_labels=batch.num_labels,
        num_images=batch.num_images,
    )
    assert step_flops(config.model, freeze, work).total == pytest.approx(counter.get_total_flops())
