"""FP8 with transformer-engine's real modules: which layers, which recipe, and what a checkpoint holds of it."""

from contextlib import nullcontext

import pytest
import torch
import transformer_engine.pytorch as te
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.fp8_utils import get_fp8_context, get_fp8_recipe

from megatron_vlm.checkpoint.sharded_state import describe_model
from megatron_vlm.models.computation import Computation
from tests.transformer_engine import stand_in
from tests.transformer_engine.layouts import BF16, build, fake_rank, layout, wide_model

CLASSES = {
    "tensorwise": "Float8CurrentScaling",
    "delayed": "DelayedScaling",
    "blockwise": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}
STATELESS = ("tensorwise", "blockwise", "mxfp8")
BLACKWELL = (10, 0)


@pytest.fixture(autouse=True)
def one_rank():
    with fake_rank(layout(1)):
        yield


def fp8_model(**settings):
    (chunk,) = build(layout(1), "transformer_engine", Computation(precision="bf16", fp8="hybrid", **settings))
    return chunk


def prepare_like_a_forward_pass(chunk):
    """Give every FP8 module the state that its first forward pass gives it."""
    config, modules = chunk.language_model.config, []
    stand_in.set_capability(BLACKWELL)  # which has every recipe
    for number, layer in enumerate(chunk.language_model.decoder.layers):
        with get_fp8_context(config, number):
            found = [module for module in layer.modules() if isinstance(module, te.Linear | te.LayerNormLinear)]
            for module in found:
                module.init_fp8_metadata()
            modules += found
    return modules


def saved_objects(chunk):
    return [value for value in nested_values(describe_model([chunk])) if isinstance(value, ShardedObject)]


@pytest.mark.parametrize(("recipe", "name"), CLASSES.items())
def test_the_recipe_of_the_settings_is_transformer_engine_s(recipe, name):
    found = get_fp8_recipe(fp8_model(fp8_recipe=recipe).language_model.config)
    assert name in {cls.__name__ for cls in type(found).__mro__}
    assert found.fp8_format.name == "HYBRID"


def test_without_a_recipe_it_is_one_without_state():
    (chunk,) = build(layout(1), "transformer_engine", Computation(precision="bf16", fp8="e4m3"))
    found = get_fp8_recipe(chunk.language_model.config)
    assert type(found).__name__ == "Float8CurrentScaling"
    assert found.fp8_format.name == "E4M3"


def test_layers_compute_in_fp8_and_the_first_and_last_in_bf16_where_asked():
    last = wide_model().language.num_layers - 1
    config = fp8_model(num_layers_at_start_in_bf16=2, num_layers_at_end_in_bf16=1).language_model.config
    in_bf16 = [number for number in range(last + 1) if isinstance(get_fp8_context(config, number), nullcontext)]
    assert in_bf16 == [0, 1, last]
    with get_fp8_context(config, 2):
        assert te.quantization.FP8GlobalStateManager.is_fp8_enabled()
    assert not te.quantization.FP8GlobalStateManager.is_fp8_enabled()


def test_every_layer_computes_in_fp8_where_nothing_else_is_asked():
    chunk = fp8_model()
    prepare_like_a_forward_pass(chunk)
    modules = [m for m in chunk.language_model.decoder.modules() if isinstance(m, te.Linear | te.LayerNormLinear)]
    assert len(modules) == 4 * wide_model().language.num_layers
    assert all(module.fp8 for module in modules)


def test_layers_in_bf16_get_no_fp8_state():
    chunk = fp8_model(num_layers_at_start_in_bf16=1)
    modules = prepare_like_a_forward_pass(chunk)
    assert [module.fp8 for module in modules[:5]] == [False, False, False, False, True]


def test_the_tower_and_the_projection_know_nothing_of_fp8():
    chunk = fp8_model()
    assert chunk.vision_model.config.fp8 is None
    assert chunk.vision_projection.config.fp8 is None


@pytest.mark.parametrize("recipe", STATELESS)
def test_recipes_without_state_leave_only_the_weights_in_a_checkpoint(recipe):
    chunk = fp8_model(fp8_recipe=recipe)
    prepare_like_a_forward_pass(chunk)
    assert not saved_objects(chunk)
    (plain,) = build(layout(1), "transformer_engine", BF16)
    assert describe_model([chunk])["model0"].keys() == describe_model([plain])["model0"].keys()


def test_delayed_scaling_leaves_the_history_of_each_matrix_product():
    chunk = fp8_model(fp8_recipe="delayed")
    assert not saved_objects(chunk)  # before the first step
    modules = prepare_like_a_forward_pass(chunk)
    objects = saved_objects(chunk)
    assert len(objects) == len(modules)
    assert all(value.key.endswith("_extra_state") and isinstance(value.data, torch.Tensor) for value in objects)


def test_transformer_engine_refuses_to_read_that_history_unless_told_to(monkeypatch):
    monkeypatch.delenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", raising=False)
    chunk = fp8_model(fp8_recipe="delayed")
    module = prepare_like_a_forward_pass(chunk)[0]
    state = module.get_extra_state()
    with pytest.raises(RuntimeError, match="NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE=1"):
        module.set_extra_state(state)
    monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")
    module.set_extra_state(state)
