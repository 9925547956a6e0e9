import pytest
import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.models.computation import Computation
from tests.support.configs import tiny_run


def test_it_is_what_the_training_says():
    settings = {"precision": "bf16", "recompute": "full", "deterministic": True, "fp8": "e4m3"}
    settings |= {"fp8_recipe": "blockwise", "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 2}
    assert Computation.from_config(tiny_run(training=settings).training) == Computation(**settings)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_weights_and_pipeline_have_one_precision(precision, dtype):
    arguments = Computation(precision=precision).common_arguments()
    assert arguments["params_dtype"] == arguments["pipeline_dtype"] == dtype
    assert arguments["bf16"] == (dtype == torch.bfloat16)


@pytest.mark.parametrize(
    ("recompute", "granularity", "of_a_tower"),
    [("none", None, None), ("full", "full", "full"), ("selective", "selective", None)],
)
def test_recomputation_of_the_attention_core_is_left_out_where_it_saves_little(recompute, granularity, of_a_tower):
    computation = Computation(recompute=recompute)
    assert computation.recompute_arguments().get("recompute_granularity") == granularity
    assert computation.recompute_arguments(selective=False).get("recompute_granularity") == of_a_tower


@pytest.mark.parametrize(("start", "end"), [(0, 0), (1, 0), (0, 2)])
def test_layers_in_bf16_are_those_that_the_settings_name(start, end):
    computation = Computation(fp8="hybrid", num_layers_at_start_in_bf16=start, num_layers_at_end_in_bf16=end)
    config = TransformerConfig(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        **computation.fp8_arguments(),
        **computation.common_arguments(),
    )
    in_bf16 = [layer for layer in range(4) if is_first_last_bf16_layer(config, layer)]
    assert in_bf16 == [*range(start), *range(4 - end, 4)]
    assert (config.fp8, config.fp8_recipe) == ("hybrid", "tensorwise")


def test_deterministic_mode_reaches_megatron_core():
    assert Computation(deterministic=True).common_arguments()["deterministic_mode"] is True
    assert Computation().common_arguments()["deterministic_mode"] is False
