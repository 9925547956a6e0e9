import pytest
import torch

from megatron_vlm.models.build import build_model
from megatron_vlm.models.computation import Computation
from megatron_vlm.training.optimizer import build_optimizer, set_learning_rate, wrap_model
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


def groups_of(config, **build):
    """Return learning-rate factor and weight decay of every parameter by name."""
    (chunk,) = build_model(config.model, config.parallel, Computation(**build), config.training.freeze)
    optimizer = build_optimizer(config, wrap_model(config, [chunk]))
    set_learning_rate(optimizer, 1.0)
    names = {id(getattr(parameter, "main_param", parameter)): name for name, parameter in chunk.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


# Of the distributed optimizer, which keeps slices of parameters, the test is what it does: see test_learning_rates.
PLAIN = {"use_distributed_optimizer": False}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_biases_norms_and_embeddings_of_positions_do_not_decay(one_rank, precision):
    config = tiny_run(parallel=PLAIN, optimizer={"weight_decay": 0.25})
    groups = groups_of(config, precision=precision)
    decays = {name for name, (_, decay) in groups.items() if decay}
    assert {decay for _, decay in groups.values()} == {0.0, 0.25}
    assert "vision_model.conv1.weight" in decays
    assert "language_model.embedding.word_embeddings.weight" in decays
    resting = {name for name in groups if name.endswith(("bias", "layernorm.weight"))} | {
        "vision_model.ln_pre.weight",
        "vision_model.position_embeddings.weight",
        "vision_model.class_token",
    }
    assert decays == set(groups) - resting


def test_more_parameters_can_be_kept_from_decay(one_rank):
    settings = {"weight_decay": 0.25, "no_weight_decay": ("language_model.embedding",)}
    groups = groups_of(tiny_run(parallel=PLAIN, optimizer=settings))
    assert groups["language_model.embedding.word_embeddings.weight"][1] == 0
    assert groups["language_model.output_layer.weight"][1] == 0.25


def test_the_last_pattern_that_matches_gives_the_learning_rate(one_rank):
    factors = {"language_model": 0.5, "language_model.decoder.layers.1": 0.1, "vision_model.conv1": 2}
    groups = groups_of(tiny_run(parallel=PLAIN, optimizer={"lr_multipliers": factors}))
    assert groups["language_model.decoder.layers.0.mlp.linear_fc1.weight"][0] == 0.5
    assert {rate for name, (rate, _) in groups.items() if ".layers.1." in name and "language" in name} == {0.1}
    assert groups["vision_model.conv1.weight"][0] == 2
    assert groups["vision_projection.encoder.linear_fc1.weight"][0] == 1


def test_what_is_frozen_is_in_no_group(one_rank):
    freeze = ("vision_model", "language_model.decoder.layers.[0-2].*")
    groups = groups_of(tiny_run(parallel=PLAIN, training={"freeze": freeze}))
    assert not any(name.startswith("vision_model") for name in groups)
    assert {name.split(".")[3] for name in groups if ".layers." in name} == {"3"}
