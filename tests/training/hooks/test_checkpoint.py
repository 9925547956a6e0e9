import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_vlm.checkpoint.folder import find_checkpoint
from megatron_vlm.checkpoint.tensors import list_tensors, read_tensor
from megatron_vlm.config import CheckpointConfig, StorageError
from megatron_vlm.training.hooks import checkpoint
from tests.support.configs import tiny_run
from tests.support.overlap import OVERLAP
from tests.support.states import METRICS, make_state

PATH = Path("checkpoints/iter_0000020")
LAYOUTS = {"plain": {}, "overlapped": OVERLAP}


def make_run(iteration=0, stop_reason=None, **settings):
    """Return a run of 100 iterations that saves after every 20th."""
    state = make_state(
        iteration=iteration, train_iters=100, stop_reason=stop_reason, chunks=[], optimizer=None, base=None
    )
    settings = {"save_interval": 20, **settings}
    state.config = dataclasses.replace(state.config, checkpoint=CheckpointConfig(**settings))
    state.progress, state.gather_parameters = dict, lambda: None
    return state


@pytest.fixture
def saves(monkeypatch):
    """Outcomes of the next saves: a path, or an error."""
    outcomes: list = []

    def save(*arguments):
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    monkeypatch.setattr(checkpoint, "_SECONDS_BEFORE_RETRY", 0.0)
    return outcomes


@pytest.fixture(autouse=True)
def noted(monkeypatch):
    """Events that the hook recorded."""
    events: list = []
    monkeypatch.setattr(
        checkpoint,
        "note_event",
        lambda state, kind, what, seconds: events.append((kind, state.iteration, what, seconds)),
    )
    return events


def steps_that_save(hook, state, saves, last):
    """Do steps up to `last` and return the iterations after which a save was tried."""
    tried = []
    for iteration in range(state.iteration + 1, last + 1):
        state.iteration, before = iteration, len(saves)
        hook.step(state, METRICS)
        tried += [iteration] * (before - len(saves))
    return tried


def failure(reason="No space left on device"):
    return StorageError(f"checkpoint not saved: {reason}", where="iter.tmp", fix="make room")


@pytest.mark.parametrize(
    ("iteration", "stop_reason", "is_saved"),
    [(19, None, False), (20, None, True), (40, None, True), (7, "signalled", True), (100, None, True)],
)
def test_checkpoints_come_at_the_interval_and_before_the_run_ends(saves, iteration, stop_reason, is_saved):
    saves.append(PATH)
    state, calls = make_run(iteration, stop_reason), []
    state.gather_parameters = lambda: calls.append(len(saves))
    checkpoint.Hook().step(state, METRICS)
    assert calls == ([1] if is_saved else [])  # before the save
    assert len(saves) == (0 if is_saved else 1)


def test_a_failed_save_is_repeated_soon_said_in_one_line_and_forgotten_once_one_succeeds(saves, caplog):
    saves += [failure(), failure(), PATH, failure(), failure(), PATH, PATH]
    tried = steps_that_save(checkpoint.Hook(), make_run(), saves, 62)
    assert tried == [20, 22, 24, 40, 42, 44, 60]
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == 4
    assert lines[0] == (
        "checkpoint not saved: No space left on device (iter.tmp); fix: make room; the run goes on, and ends if the "
        "next 2 saves fail, too"
    )


@pytest.mark.parametrize("limit", [1, 3])
def test_the_run_ends_after_as_many_failed_saves_in_a_row_as_the_config_allows(saves, limit):
    saves += [failure(str(number)) for number in range(limit)]
    with pytest.raises(StorageError, match=f"checkpoint not saved: {limit - 1}") as found:
        steps_that_save(checkpoint.Hook(), make_run(max_failed_saves=limit), saves, 100)
    assert not saves
    assert found.value.what.startswith("3 saves in a row failed, the last: " if limit == 3 else "checkpoint")


def test_the_save_at_the_end_is_repeated_at_once(saves):
    saves += [failure(), failure(), PATH]
    checkpoint.Hook().step(make_run(7, "signalled"), METRICS)
    assert not saves


def test_every_save_is_an_event_with_the_time_that_it_held_up_the_steps(saves, noted, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoint.time, "perf_counter", lambda: now[0])
    outcomes = [failure(), PATH, PATH]

    def save(*arguments):
        now[0] += 2.5
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    hook, state = checkpoint.Hook(), make_run()
    for iteration in range(1, 41):
        now[0] += 1.0
        state.iteration = iteration
        hook.step(state, METRICS)
    assert noted == [
        ("failed_save", 20, str(failure()), 2.5),
        ("save", 22, "saved iter_0000020", 2.5),
        ("save", 40, "saved iter_0000020", 2.5),
    ]


class LateSaves:
    """Stands for `BackgroundSaves`: a save ends at the second poll, or when it is waited for."""

    def __init__(self, outcomes):
        self.outcomes, self.polls, self.events = outcomes, None, []

    def start(self, *what):
        assert self.polls is None
        self.polls = 0
        self.events.append("start")

    def poll(self):
        if self.polls is None:
            return None
        self.polls += 1
        return self.wait() if self.polls == 2 else None

    def wait(self):
        if self.polls is None:
            return None
        self.polls = None
        self.events.append("end")
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def test_an_asynchronous_save_that_fails_is_repeated_and_the_last_is_waited_for(saves, monkeypatch):
    late = LateSaves([failure(), failure(), PATH, PATH])
    monkeypatch.setattr(checkpoint, "BackgroundSaves", lambda: late)
    hook, state = checkpoint.Hook(), make_run(async_save=True)
    hook.start(state)
    saves.append(PATH)
    started = {}
    for iteration in range(1, 42):
        state.iteration = iteration
        state.stop_reason = "signalled" if iteration == 41 else None
        hook.step(state, METRICS)
        started.setdefault(late.events.count("start"), iteration)
    # Each failure was found two steps after its save began.
    assert [started[number] for number in (1, 2, 3, 4)] == [20, 24, 28, 40]
    assert late.events == ["start", "end"] * 4  # the one of iteration 40 was waited for at 41
    assert not saves  # and that of 41 was not left to the background
    hook.close(state)


@pytest.mark.distributed
def test_saved_weights_are_whole_where_their_gather_is_overlapped(workers, tmp_path):
    """Each rank updates its own shard; without a gather before the save, the others' shards are a step behind."""
    tensors = []
    for name, parallel in LAYOUTS.items():
        config = tiny_run(str(tmp_path / name), parallel=parallel, training={"global_batch_size": 2, "train_iters": 2})
        workers.run("tests.support.jobs:save_after_steps", 2, config=config, rows=[[0], [1], [2], [3]])
        folder = find_checkpoint(str(tmp_path / name))
        tensors.append({key: read_tensor(folder, key) for key in list_tensors(folder)})
    plain, overlapped = tensors
    assert plain.keys() == overlapped.keys()
    # A step moves a weight by about the learning rate of 1e-3; sums in another order, by rounding.
    assert all(torch.allclose(plain[key], overlapped[key], rtol=0, atol=1e-5) for key in plain)
