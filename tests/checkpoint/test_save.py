import dataclasses
import errno
import itertools
import os
import shutil

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from megatron_vlm.checkpoint.folder import list_iterations
from megatron_vlm.checkpoint.save import save_checkpoint
from megatron_vlm.checkpoint.verify import check_whole, checkpoint_folders, inspect_checkpoint
from megatron_vlm.config import CheckpointConfig, CheckpointError, StorageError
from tests.support.configs import tiny_run
from tests.support.jobs import start


@pytest.fixture
def state(one_rank, tmp_path):
    config = dataclasses.replace(tiny_run(str(tmp_path)), checkpoint=CheckpointConfig(keep_last=2))
    return start(config)


def save(state, *iterations):
    for iteration in iterations:
        state.iteration = iteration
        save_checkpoint(state.config, state.chunks, state.optimizer, state.progress())


def test_the_newest_are_kept_and_valid(state, tmp_path):
    save(state, 1, 2, 3)
    assert list_iterations(tmp_path) == [3, 2]
    assert all(inspect_checkpoint(path, read_files=True).is_valid for path in checkpoint_folders(tmp_path))
    assert (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "3\n"


def test_a_full_disk_leaves_the_previous_checkpoint_as_it_was(state, tmp_path, monkeypatch):
    save(state, 1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("megatron_vlm.checkpoint.save.write_state", full)
    with pytest.raises(StorageError, match="checkpoint not saved: No space left on device"):
        save(state, 2)
    assert list_iterations(tmp_path) == [1]
    assert inspect_checkpoint(checkpoint_folders(tmp_path)[0], read_files=True).is_valid


def test_a_file_that_the_writer_cannot_write_is_an_error_of_the_storage(state, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise CheckpointException("write", {})

    monkeypatch.setattr("megatron_vlm.checkpoint.save.write_state", full)
    with pytest.raises(StorageError, match="checkpoint not saved: a file was not written .*; fix: make room"):
        save(state, 1)


def test_a_flipped_bit_is_a_fault(state, tmp_path):
    save(state, 1)
    path = next((tmp_path / "checkpoints").glob("*/common.pt"))
    content = bytearray(path.read_bytes())
    content[-10] ^= 4
    path.write_bytes(content)
    (folder,) = checkpoint_folders(tmp_path)
    assert inspect_checkpoint(folder, read_files=True).faults == ("common.pt has the wrong checksum",)
    assert inspect_checkpoint(folder, read_files=False).is_valid
    with pytest.raises(CheckpointError, match="common.pt has the wrong checksum"):
        check_whole(folder)


def test_a_folder_without_checkpoints_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint found"):
        checkpoint_folders(tmp_path)


class Killed(BaseException):
    pass


def kill_at(monkeypatch, number):
    """Raise in place of the given call, counted from 0, that renames or removes something."""
    calls = itertools.count()

    def counted(function):
        def call(*args, **kwargs):
            if next(calls) >= number:
                raise Killed
            return function(*args, **kwargs)

        return call

    for module, name in ((os, "replace"), (os, "rename"), (shutil, "rmtree")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))


def test_a_kill_at_any_step_of_a_save_over_the_only_checkpoint_loses_nothing(state, tmp_path, monkeypatch):
    save(state, 2)
    for number in itertools.count():
        try:
            with monkeypatch.context() as patch:
                kill_at(patch, number)
                save(state, 2)
        except BaseException as error:  # torch wraps what is raised while it writes
            was_killed = "Killed" in repr(error)
        else:
            break
        assert was_killed
        assert start(state.config).iteration == 2, f"killed at call {number}"
        assert [path.name for path in (tmp_path / "checkpoints").glob("iter_*")] == ["iter_0000002"]
        (folder,) = checkpoint_folders(tmp_path)
        assert inspect_checkpoint(folder, read_files=True).is_valid
    assert number >= 5
