import json
import logging
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_vlm.platform.files.events import SPIKE, read_events
from megatron_vlm.platform.files.metrics import drop_after
from megatron_vlm.training.hooks.spikes import MIN_VALUES, Hook, SpikeFinder
from tests.support.states import METRICS, make_state


def curve(count, seed=1):
    rng = random.Random(seed)
    return [2.0 + 0.1 * rng.uniform(-1, 1) for _ in range(count)]


def test_a_spike_is_a_value_above_the_mean_and_so_many_standard_deviations():
    values = curve(50)
    mean, sigma = np.mean(values), np.std(values)
    for value, is_spike in ((mean + 5.9 * sigma, False), (mean + 6.1 * sigma, True)):
        finder = SpikeFinder(6.0, 50)
        assert [finder.add(one) for one in values] == [None] * 50
        found = finder.add(value)
        assert (found is not None) == is_spike
    assert (found.value, found.mean, found.sigma) == pytest.approx((value, mean, sigma))


def test_falling_and_flat_curves_have_none_and_neither_have_the_first_values():
    finder = SpikeFinder(6.0, 100)
    assert [finder.add(10.0 / (1 + step)) for step in range(300)] == [None] * 300
    finder = SpikeFinder(6.0, 100)
    assert [finder.add(2.0 + 0.001 * (step % 2)) for step in range(300)] == [None] * 300
    finder = SpikeFinder(6.0, 100)
    assert [finder.add(10.0**step) for step in range(MIN_VALUES)] == [None] * MIN_VALUES


def test_a_short_window_has_none_before_it_is_full():
    finder = SpikeFinder(6.0, 4)
    assert [finder.add(value) is not None for value in (2.0, 2.1, 2.0, 2.1, 9.0)] == [False] * 4 + [True]


def test_one_spike_does_not_hide_the_next_and_a_lasting_change_is_no_spike_for_ever():
    finder = SpikeFinder(6.0, 50)
    for value in curve(50):
        finder.add(value)
    assert finder.add(1000.0) is not None
    finder.add(2.0)
    assert finder.add(4.0) is not None
    found = [finder.add(4.0) for _ in range(100)]
    assert found[-1] is None


def state_of(run_dir, iteration, **training):
    plan = SimpleNamespace(sample_ids=lambda index: np.array([index, index + 100]))
    return make_state(run_dir, iteration, plan=plan, training={"train_iters": 1000, **training})


def run(hook, state, values, grad_norms=None):
    hook.start(state)
    for number, value in enumerate(values):
        state.iteration += 1
        norm = grad_norms[number] if grad_norms else 1.0
        hook.step(state, replace(METRICS, loss=value, grad_norm=norm))
        with (state.folder / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps({"iteration": state.iteration, "loss": value, "grad_norm": norm}) + "\n")


def spikes(run_dir):
    return [(event.iteration, event.details["name"]) for event in read_events(run_dir)[0] if event.kind == SPIKE]


def test_a_spike_is_recorded_with_its_samples(tmp_path, caplog):
    state = state_of(tmp_path, 0)
    state.folder = tmp_path
    with caplog.at_level(logging.WARNING):
        run(Hook(), state, [*curve(30), 9.0, 2.0], [*[1.0] * 31, 50.0])
    assert spikes(tmp_path) == [(31, "loss"), (32, "grad_norm")]
    assert "loss 9 at iteration 31 is" in caplog.text
    events, _ = read_events(tmp_path)
    assert events[0].details["sample_ids"] == [30, 130]
    assert events[0].details["value"] == 9.0


def test_a_resumed_run_finds_what_one_that_was_not_stopped_finds(tmp_path):
    values = [*curve(40), 3.0, *curve(10, seed=2), 2.9, *curve(10, seed=3), 2.9]
    found = []
    for name, stops in (("whole", ()), ("parts", (45, 53))):
        folder = tmp_path / name
        folder.mkdir()
        borders = [0, *stops, len(values)]
        for first, last in zip(borders, borders[1:], strict=False):
            # Steps after the checkpoint were done and are lost.
            state = state_of(folder, max(0, first - 3))
            state.folder = folder
            drop_after(folder / "metrics.jsonl", state.iteration)
            run(Hook(), state, values[max(0, first - 3) : last])
        found.append(sorted(set(spikes(folder))))
    assert found[0] == found[1]
    assert len(found[0]) == 3


def test_a_resumed_run_takes_no_more_values_than_two_windows(tmp_path, monkeypatch):
    values = [9.0 if step in (350, 440, 499) else value for step, value in enumerate(curve(500))]
    whole = SpikeFinder(6.0, 50)
    for value in values:
        whole.add(value)
    lines = [json.dumps({"iteration": number, "loss": value}) for number, value in enumerate(values, start=1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    hook, taken = Hook(), []
    add = SpikeFinder.add
    monkeypatch.setattr(SpikeFinder, "add", lambda self, value: taken.append(value) or add(self, value))
    hook.start(state_of(tmp_path, 500, spike_window=50))
    assert len(taken) == 100
    assert list(hook._finders["loss"]._values) == pytest.approx(list(whole._values), rel=0.05)


def test_steps_without_labels_do_not_count_in_a_run_and_in_a_resumed_one(tmp_path):
    losses = [*curve(30), *[None] * 25, 2.0, *curve(5)]
    norms = [*[1.0] * 30, *[0.0] * 25, 1.0, *[1.0] * 5]
    for name, stop in (("whole", len(losses)), ("parts", 55)):
        (folder := tmp_path / name).mkdir()
        for first, last in ((0, stop), (stop, len(losses))):
            state = state_of(folder, first)
            state.folder = folder
            run(Hook(), state, losses[first:last], norms[first:last])
        assert spikes(folder) == []


def test_it_can_be_turned_off(tmp_path):
    state = state_of(tmp_path, 0, spike_sigmas=None)
    state.folder = tmp_path
    run(Hook(), state, [*curve(30), 9.0])
    assert spikes(tmp_path) == []
