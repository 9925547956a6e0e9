import pytest
import torch

from megatron_vlm.models.build import build_model
from megatron_vlm.models.computation import Computation
from megatron_vlm.training.optimizer import wrap_model
from tests.support.configs import tiny_run


class LayerOfTransformerEngine(torch.nn.Linear):
    """Has the switch of transformer-engine's linear layers."""

    fuse_wgrad_accumulation = False


@pytest.mark.parametrize("learns", [True, False])
def test_layers_of_transformer_engine_add_gradients_to_the_buffers_where_they_learn(one_rank, learns):
    config = tiny_run()
    (chunk,) = build_model(config.model, config.parallel, Computation())
    chunk.language_model.layer = LayerOfTransformerEngine(8, 8).requires_grad_(learns)
    (wrapped,) = wrap_model(config, [chunk])
    layer = wrapped.module.language_model.layer
    assert layer.fuse_wgrad_accumulation is learns
    assert hasattr(layer.weight, "main_grad") is learns
    # megatron-core's own layers would need apex.
    assert chunk.language_model.output_layer.gradient_accumulation_fusion is False
