import json

import pytest

from megatron_vlm.platform.files.events import START, read_events, record_event
from megatron_vlm.training.hooks.attempt import Hook
from tests.support.states import METRICS, make_state


def write_steps(run_dir, last):
    lines = [{"iteration": n, "loss": 1.0, "seconds": 2.0, "unix_time": 1000.0 + n} for n in range(1, last + 1)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def begin(run_dir, iteration, **changes):
    state = make_state(run_dir, iteration, goodput=None, **changes)
    hook = Hook()
    hook.start(state)
    return hook, state


def test_a_new_run_begins_and_loses_nothing(tmp_path):
    begin(tmp_path, 0)
    (event,) = read_events(tmp_path)[0]
    assert (event.kind, event.iteration, event.what) == ("begin", 0, "began")
    assert event.details == {"lost_iterations": 0, "lost_seconds": 0.0}


def test_a_resumed_run_tells_which_steps_are_done_again(tmp_path):
    write_steps(tmp_path, 7)
    begin(tmp_path, 4)
    (event,) = read_events(tmp_path)[0]
    assert event.what == "resumed after iteration 4; 3 steps after it are done again"
    assert event.details == {"lost_iterations": 3, "lost_seconds": 6.0, "lost_until": 1007.0}


def test_damaged_checkpoints_that_were_passed_over_are_events(tmp_path):
    begin(tmp_path, 4, damaged_checkpoints={"iter_0000006": "a.distcp differs"})
    _, event = read_events(tmp_path)[0]
    assert (event.kind, event.iteration, event.details) == ("damaged_checkpoint", 4, {"checkpoint": "iter_0000006"})
    assert event.what == "iter_0000006 is damaged and was passed over: a.distcp differs"


def test_goodput_counts_from_the_first_start_and_the_steps_that_stay(tmp_path, monkeypatch):
    write_steps(tmp_path, 7)
    monkeypatch.setattr("time.time", lambda: 500.0)
    record_event(tmp_path, START, "started")
    monkeypatch.setattr("time.time", lambda: 2000.0)
    hook, state = begin(tmp_path, 4)
    assert (state.goodput.first_start, state.goodput.seconds_in_steps) == (500.0, 8.0)
    hook.step(state, METRICS)
    assert state.goodput.seconds_in_steps == 8.5


def test_steps_of_a_version_without_events_are_no_part_of_the_goodput(tmp_path):
    lines = ({"iteration": n, "loss": 1.0, "seconds": 2.0} for n in range(1, 8))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, state = begin(tmp_path, 4)
    (event,) = read_events(tmp_path)[0]
    assert event.details == {"lost_iterations": 3, "lost_seconds": 0.0}
    assert state.goodput.seconds_in_steps == 0.0


def test_other_ranks_record_nothing(tmp_path):
    hook, state = begin(tmp_path, 0, is_reporter=False)
    hook.step(state, METRICS)
    hook.close(state)
    assert state.goodput is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", ["", "[]", '{"iteration": 5}'])
def test_damaged_lines_of_metrics_do_not_matter(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(line)
    begin(tmp_path, 4)
    assert read_events(tmp_path)[0][0].details["lost_seconds"] == 0.0
