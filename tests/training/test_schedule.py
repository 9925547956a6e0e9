import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlm.config import ConfigError, OptimizerConfig
from megatron_vlm.training.schedule import learning_rate, num_warmup_iters


def test_warm_up_is_linear_and_ends_at_the_peak():
    optimizer = OptimizerConfig(lr=1.0, lr_warmup_iters=4)
    assert [learning_rate(optimizer, i, 10) for i in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_cosine_is_at_half_the_range_in_the_middle_of_the_decay():
    optimizer = OptimizerConfig(lr=1.0, min_lr=0.2, lr_warmup_iters=0)
    assert learning_rate(optimizer, 50, 100) == pytest.approx(0.6)


def test_linear_decay_is_linear():
    optimizer = OptimizerConfig(lr=1.0, lr_decay_style="linear", lr_warmup_iters=0)
    assert learning_rate(optimizer, 75, 100) == pytest.approx(0.25)


def test_constant_stays_at_the_peak():
    optimizer = OptimizerConfig(lr=0.5, lr_decay_style="constant", lr_warmup_iters=2)
    assert {learning_rate(optimizer, i, 10) for i in range(2, 10)} == {0.5}


def test_warmup_fraction_is_rounded_up_as_hugging_face_does():
    assert num_warmup_iters(OptimizerConfig(lr=1.0, lr_warmup_fraction=0.03), 101) == 4


def test_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ConfigError, match="warm-up of 11 iterations is longer than the run of 10"):
        learning_rate(OptimizerConfig(lr=1.0, lr_warmup_iters=11), 0, 10)


@given(iteration=st.integers(0, 99), style=st.sampled_from(["cosine", "linear", "constant"]))
def test_rate_stays_between_its_ends(iteration, style):
    optimizer = OptimizerConfig(lr=1e-3, min_lr=1e-5, lr_decay_style=style, lr_warmup_iters=0)
    assert 1e-5 <= learning_rate(optimizer, iteration, 100) <= 1e-3
