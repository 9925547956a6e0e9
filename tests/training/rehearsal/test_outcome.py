import pytest

from megatron_vlm.config import ConfigError
from megatron_vlm.training.rehearsal.outcome import check_outcome
from tests.support.configs import tiny_run

GIB = 2**30


def facts(activations=1, state=1, fits=True, differences=()):
    stage = {
        "stage": 1,
        "weights": state * GIB,
        "gradients": 0,
        "optimizer": 0,
        "activations": activations * GIB,
        "peak": (activations + state) * GIB,
        "fits": fits,
    }
    return {"stages": [stage], "differences": differences, "libraries": 4 * GIB, "gpu_memory": 75 * GIB}


def test_job_that_fits_and_agrees_passes():
    check_outcome(facts(), tiny_run(), "A100")


@pytest.mark.parametrize(
    ("found", "settings", "fix"),
    [
        ((80, 1), {}, "training.recompute=full, or parallel.tensor_model_parallel_size=2"),
        ((80, 1), {"micro_batch_size": 4}, "training.micro_batch_size=2"),
        ((80, 1), {"recompute": "full"}, "set parallel.tensor_model_parallel_size=2"),
        ((1, 80), {}, "parallel.tensor_model_parallel_size=2, or parallel.pipeline_model_parallel_size=2"),
    ],
)
def test_stage_that_does_not_fit_is_named_with_the_setting_to_change(found, settings, fix):
    with pytest.raises(ConfigError, match="stage 1 needs 85.0 GiB .* A100 has 75.0") as caught:
        check_outcome(facts(*found, fits=False), tiny_run(training=settings), "A100")
    assert fix in caught.value.fix


def test_state_that_is_not_sharded_is_sharded_first():
    with pytest.raises(ConfigError) as caught:
        check_outcome(facts(1, 80, fits=False), tiny_run(parallel={"use_distributed_optimizer": False}), "A100")
    assert caught.value.fix.startswith("set parallel.use_distributed_optimizer=true")


def test_first_difference_is_the_error_and_the_others_are_counted():
    differences = [{"summary": "ranks 0 and 1 differ in call 3 of x"}, {"summary": "other"}]
    with pytest.raises(ConfigError, match="ranks 0 and 1 differ in call 3 of x \\(and 1 more\\)"):
        check_outcome(facts(differences=differences), tiny_run(), "A100")
