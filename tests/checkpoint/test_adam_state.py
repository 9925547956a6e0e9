"""Runs that go on with another Adam than the one that they were saved with."""

import pytest
import torch

from megatron_vlm.checkpoint.adam_state import MOMENTS, adams, create_state, set_step_count, step_count
from megatron_vlm.checkpoint.save import save_checkpoint
from tests.support.configs import tiny_run
from tests.support.fused_adam import FusedAdam
from tests.support.jobs import FixedPlan, batches_of, start, step
from tests.support.samples import make_samples

BEFORE, AFTER = 2, 2
ROWS = [[index] for index in range(4 * (BEFORE + AFTER))]
# The two write the update in another order (float32).
TOLERANCE = 1e-5


@pytest.fixture
def use_adam(monkeypatch):
    """A function that lets megatron-core take torch's AdamW, as without transformer-engine, or the stand-in."""

    def use(name):
        monkeypatch.setattr("megatron.core.optimizer.USING_PYTORCH_OPTIMIZER", name == "torch")
        for module in ("megatron.core.optimizer", "megatron.core.optimizer.distrib_optimizer"):
            monkeypatch.setattr(f"{module}.Adam", torch.optim.AdamW if name == "torch" else FusedAdam)

    return use


def go(config, num_steps):
    """Start or resume and do steps; return the state and the losses."""
    state = start(config, FixedPlan.of(config, ROWS))
    return state, go_on(state, num_steps)


def go_on(state, num_steps):
    loader = batches_of(state.config, state.rank, ROWS, make_samples(len(ROWS)), state.iteration)
    return [step(state, [loader]).loss for _ in range(num_steps)]


def moments(state):
    return [entry[name] for adam in adams(state.optimizer) for entry in adam.state.values() for name in MOMENTS]


@pytest.mark.parametrize(("first", "second"), [("fused", "fused"), ("torch", "fused"), ("fused", "torch")])
@pytest.mark.parametrize("distributed", [True, False], ids=["distributed", "plain"])
def test_a_run_goes_on_with_another_adam(one_rank, tmp_path, use_adam, first, second, distributed):
    config = tiny_run(str(tmp_path), parallel={"use_distributed_optimizer": distributed})
    use_adam(first)
    saved, _ = go(config, BEFORE)
    save_checkpoint(config, saved.chunks, saved.optimizer, saved.progress())
    held = [values.clone() for values in moments(saved)]
    expected = go_on(saved, AFTER)

    use_adam(second)
    resumed, _ = go(config, 0)
    assert step_count(resumed.optimizer) == BEFORE
    assert all(torch.equal(a, b) for a, b in zip(moments(resumed), held, strict=True))
    assert go_on(resumed, AFTER) == (expected if first == second else pytest.approx(expected, rel=TOLERANCE))
    assert step_count(resumed.optimizer) == BEFORE + AFTER
    for group in adams(resumed.optimizer)[0].param_groups:
        assert group.get("fused") is (True if second == "torch" else None)


class Holder:
    """An optimizer of megatron-core, as far as its Adam goes."""

    def __init__(self, adam):
        self.optimizer = adam


def parameters(count):
    return [torch.nn.Parameter(torch.ones(3)) for _ in range(count)]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, FusedAdam])
def test_a_new_adam_has_taken_no_step_and_its_first_is_the_first(kind):
    plain, prepared = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    for parameter, is_prepared in ((plain, False), (prepared, True)):
        adam = kind([parameter], lr=0.1)
        if is_prepared:
            create_state(adam)
            set_step_count(Holder(adam), 0)
            assert step_count(Holder(adam)) == 0
        parameter.grad = torch.tensor([1.0, -2.0, 3.0])
        adam.step()
        assert step_count(Holder(adam)) == 1
    assert torch.equal(plain, prepared)


def test_every_parameter_counts_by_itself():
    adam = torch.optim.AdamW(parameters(3))
    create_state(adam)
    set_step_count(Holder(adam), 7)
    for state in list(adam.state.values())[:1]:
        state["step"] += 1
    with pytest.raises(RuntimeError, match=r"different numbers of optimizer steps: \[7, 8\]"):
        step_count(Holder(adam))


def test_a_group_without_parameters_does_not_count():
    adam = FusedAdam([{"params": parameters(1)}, {"params": []}])
    adam.param_groups[0]["step"] = 5
    assert step_count(Holder(adam)) == 5
    assert step_count(Holder(None)) == 0
