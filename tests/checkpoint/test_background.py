"""A save that goes on while the run does: it holds the values of the call, and tells how it ended."""

import dataclasses
import threading
import time

import pytest
import torch
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner

from megatron_vlm.checkpoint import background
from megatron_vlm.checkpoint.background import BackgroundSaves
from megatron_vlm.checkpoint.folder import checkpoint_path, list_iterations
from megatron_vlm.checkpoint.save import save_checkpoint, write_save
from megatron_vlm.checkpoint.tensors import hash_weights
from megatron_vlm.checkpoint.verify import check_whole
from megatron_vlm.config import CheckpointConfig, NumericError, StorageError
from tests.support.configs import tiny_run
from tests.support.jobs import start
from tests.support.small_disk import files_of_at_most


@pytest.fixture
def state(one_rank, tmp_path):
    config = tiny_run(str(tmp_path / "run"), training={"precision": "fp32"})
    return start(dataclasses.replace(config, checkpoint=CheckpointConfig(keep_last=0)))


@pytest.fixture
def gate(monkeypatch):
    """Writers wait until it is set."""
    opened = threading.Event()

    def late(*arguments):
        opened.wait(60)
        return write_save(*arguments)

    monkeypatch.setattr(background, "write_save", late)
    return opened


def call(state, save, iteration):
    state.iteration = iteration
    return save(state.config, state.chunks, state.optimizer, state.progress())


def change_all(state, value):
    with torch.no_grad():
        for group in state.optimizer.param_groups:
            for weight in group["params"]:
                weight.fill_(value)
        for chunk in state.chunks:
            for weight in chunk.parameters():
                weight.fill_(value)


def test_weights_changed_right_after_the_call_do_not_reach_the_files(state, gate):
    call(state, save_checkpoint, 1)
    saves = BackgroundSaves()
    for iteration in (2, 3):  # the second one writes from the memory of the first
        call(state, saves.start, iteration)
        change_all(state, float(iteration))
        assert saves.poll() is None
        assert not checkpoint_path(state.config.run_dir, iteration).exists()
        gate.set()
        assert saves.wait() == checkpoint_path(state.config.run_dir, iteration)
        gate.clear()
    call(state, save_checkpoint, 4)
    folders = {number: checkpoint_path(state.config.run_dir, number) for number in (1, 2, 3, 4)}
    for folder in folders.values():
        check_whole(folder)
    hashes = {number: hash_weights(folder) for number, folder in folders.items()}
    assert hashes[1] == hashes[2]
    assert len({hashes[number] for number in (2, 3, 4)}) == 3


def test_files_are_planned_by_the_thread_that_writes(state, monkeypatch):
    planners, plan = [], MCoreSavePlanner.create_local_plan

    def create(self):
        planners.append(threading.current_thread().name)
        return plan(self)

    monkeypatch.setattr(MCoreSavePlanner, "create_local_plan", create)
    saves = BackgroundSaves()
    call(state, saves.start, 1)
    saves.wait()
    assert planners == ["checkpoint"]


def test_one_save_at_a_time_and_its_end_is_told_once(state, gate):
    saves = BackgroundSaves()
    assert (saves.poll(), saves.wait()) == (None, None)
    call(state, saves.start, 1)
    with pytest.raises(RuntimeError, match="a save is in flight"):
        call(state, saves.start, 2)
    gate.set()
    saves._thread.join()
    assert saves.poll() == checkpoint_path(state.config.run_dir, 1)
    assert (saves.poll(), saves.wait()) == (None, None)


def test_a_writer_that_fails_is_told_when_it_is_waited_for(state):
    saves = BackgroundSaves()
    with files_of_at_most(1000):
        call(state, saves.start, 1)
        with pytest.raises(StorageError, match="checkpoint not saved: File too large"):
            saves.wait()
    assert list_iterations(state.config.run_dir) == []
    call(state, saves.start, 2)
    assert saves.wait() == checkpoint_path(state.config.run_dir, 2)


def test_the_writer_gives_no_sign_of_life_and_who_waits_for_it_does(state, monkeypatch):
    """A sign that the writer gave would stand for a main thread that hangs."""
    waiting, beats = threading.Event(), []

    def write(save, group, show_life):
        show_life()
        waiting.wait(60)
        for _ in range(3):
            show_life()
            time.sleep(0.05)

    monkeypatch.setattr(background, "write_save", write)
    monkeypatch.setattr(background, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(background, "beat", lambda: beats.append(threading.current_thread()))
    saves = BackgroundSaves()
    call(state, saves.start, 1)
    assert saves.poll() is None
    assert not beats
    waiting.set()
    saves.wait()
    assert set(beats) == {threading.main_thread()}


def test_copies_that_are_not_finite_are_not_saved(state):
    change_all(state, float("nan"))
    saves = BackgroundSaves()
    call(state, saves.start, 1)
    with pytest.raises(NumericError, match="is not finite after iteration 1"):
        saves.wait()
    assert list_iterations(state.config.run_dir) == []


@pytest.mark.distributed
@pytest.mark.parametrize("is_async", [False, True])
def test_a_full_disk_of_one_rank_fails_the_save_on_all_and_the_next_one_succeeds(workers, tmp_path, is_async):
    config = tiny_run(str(tmp_path))
    ranks = workers.run("tests.support.file_jobs:save_on_a_full_disk", 2, config=config, is_async=is_async)
    assert ranks[0] == ranks[1]
    error, iterations = ranks[0]
    assert error.startswith("checkpoint not saved: File too large")
    assert "__1_0.distcp" in error
    assert iterations == [2]
