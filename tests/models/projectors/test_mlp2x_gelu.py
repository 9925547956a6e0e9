import math

import torch

from megatron_vlm.config import ParallelConfig
from megatron_vlm.models.build import build_model
from megatron_vlm.models.computation import Computation
from tests.support.configs import tiny_model


def test_it_is_two_products_with_the_exact_gelu_between(one_rank):
    projection = build_model(tiny_model(), ParallelConfig(), Computation())[0].vision_projection
    weights = dict(projection.named_parameters())
    for name in ("encoder.linear_fc1.bias", "encoder.linear_fc2.bias"):
        torch.nn.init.normal_(weights[name])
    x = 10 * torch.randn(2, 16, 36)
    inside = x @ weights["encoder.linear_fc1.weight"].T + weights["encoder.linear_fc1.bias"]
    inside = inside * 0.5 * (1 + torch.erf(inside / math.sqrt(2)))  # the tanh approximation differs by up to 5e-4
    expected = inside @ weights["encoder.linear_fc2.weight"].T + weights["encoder.linear_fc2.bias"]
    torch.testing.assert_close(projection(x), expected, rtol=1e-5, atol=1e-5)
