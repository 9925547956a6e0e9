import pytest
import torch

from megatron_vlm.models.computation import Computation
from tests.support.configs import tiny_run


def test_it_is_what_the_training_says():
    training = tiny_run(training={"precision": "bf16", "recompute": "full"}).training
    assert Computation.from_config(training) == Computation(precision="bf16", recompute="full", fp8=None)


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
