from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_vlm.training.hooks.tensorboard import Hook
from tests.support.states import METRICS, make_state


def test_every_number_is_a_curve_under_its_name_in_metrics(tmp_path):
    hook = Hook()
    hook.start(make_state(tmp_path))
    hook.step(make_state(tmp_path, 1, validation_losses={"validation_loss/coyo": 1.5}), METRICS)
    hook.close(make_state(tmp_path, 1))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert {"loss", "loss/coyo", "loss/mmc4", "validation_loss/coyo", "grad_norm", "data_wait"} <= names
    assert [(event.step, event.value) for event in events.Scalars("loss/coyo")] == [(1, 2.0)]
    assert [(event.step, event.value) for event in events.Scalars("validation_loss/coyo")] == [(1, 1.5)]


def test_other_ranks_write_nothing(tmp_path):
    hook, state = Hook(), make_state(tmp_path, is_reporter=False)
    hook.start(state)
    hook.step(state, METRICS)
    hook.close(state)
    assert not list(tmp_path.iterdir())
