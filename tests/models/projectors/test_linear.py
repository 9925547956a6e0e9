import dataclasses

import torch

from megatron_vlm.config import ParallelConfig
from megatron_vlm.config.projectors import make_projector
from megatron_vlm.models.build import build_model
from megatron_vlm.models.computation import Computation
from tests.support.configs import tiny_model


def test_it_is_one_product_and_a_bias(one_rank):
    model = dataclasses.replace(tiny_model(), projection=make_projector("linear"))
    projection = build_model(model, ParallelConfig(), Computation())[0].vision_projection
    weights = dict(projection.named_parameters())
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == {
        "encoder.weight": (64, 36),
        "encoder.bias": (64,),
    }
    torch.nn.init.normal_(weights["encoder.bias"])
    x = torch.randn(2, 16, 36)
    expected = x @ weights["encoder.weight"].T + weights["encoder.bias"]
    torch.testing.assert_close(projection(x), expected, rtol=1e-5, atol=1e-6)
