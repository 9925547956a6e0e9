import dataclasses
import errno
import itertools
import os
import re
import shutil

import pytest

from megatron_vlm.checkpoint.folder import list_iterations
from megatron_vlm.checkpoint.save import save_checkpoint
from megatron_vlm.checkpoint.verify import check_whole, checkpoint_folders, inspect_checkpoint
from megatron_vlm.config import CheckpointConfig, CheckpointError, StorageError
from megatron_vlm.platform.files.durable import UNFINISHED
from tests.support.configs import tiny_run
from tests.support.jobs import start
from tests.support.small_disk import files_of_at_most


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


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_disk_that_fills_up_at_any_byte_leaves_the_previous_checkpoint_as_it_was(state, tmp_path, share):
    save(state, 1)
    (before,) = checkpoint_folders(tmp_path)
    # The size of the larger file; a thread that loses its error would leave the checkpoint without its tensors.
    sizes = sorted(path.stat().st_size for path in before.glob("*.distcp"))
    with (
        files_of_at_most(int(sizes[-1] * share)),
        pytest.raises(StorageError, match="not saved: File too large") as found,
    ):
        save(state, 2)
    assert found.value.where.startswith(str(tmp_path / "checkpoints" / f"iter_0000002{UNFINISHED}"))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()] == ["iter_0000001"]
    assert (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "1\n"
    assert inspect_checkpoint(before, read_files=True).is_valid
    save(state, 2)
    assert list_iterations(tmp_path) == [2, 1]


def test_what_a_save_needs_and_the_disk_has_is_said_before_anything_is_written(state, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    message = (
        r"not saved: it needs 0\.0\d\d GB, the disk has 0\.001 GB free .*iter_0000001\.megatron_vlm.*; fix: make room"
    )
    with pytest.raises(StorageError, match=message):
        save(state, 1)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_save_asks_for_little_more_room_than_it_takes(state, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1))
    with pytest.raises(StorageError) as error:
        save(state, 1)
    asked = float(re.search(r"it needs ([\d.]+) GB", error.value.what).group(1)) * 1e9
    monkeypatch.undo()
    save(state, 1)
    taken = sum(path.stat().st_size for path in (tmp_path / "checkpoints").rglob("*") if path.is_file())
    assert taken < asked + 5e5  # the message is rounded
    assert asked < 1.5 * taken + 1.5e6


def test_a_file_system_that_knows_no_sizes_is_not_full(state, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(total=0, free=0))
    save(state, 1)


def test_whatever_keeps_a_rank_from_writing_is_a_failed_save(state, monkeypatch):
    def wrong(*arguments):
        raise ValueError("no such thing")

    monkeypatch.setattr("megatron_vlm.checkpoint.parallel_files.write_items", wrong)
    with pytest.raises(StorageError, match="checkpoint not saved: ValueError: no such thing .*rank 0"):
        save(state, 1)


def test_an_old_checkpoint_that_cannot_be_removed_is_no_failed_save(state, tmp_path, monkeypatch, caplog):
    save(state, 1, 2)

    def broken(path, *arguments):
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("megatron_vlm.checkpoint.folder.shutil.rmtree", broken)
        save(state, 3)
    assert "an old checkpoint was not removed: Input/output error" in caplog.text
    assert list_iterations(tmp_path) == [3, 2, 1]
    save(state, 4)
    assert list_iterations(tmp_path) == [4, 3]


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
        except Killed:
            pass
        else:
            break
        assert start(state.config).iteration == 2, f"killed at call {number}"
        assert [path.name for path in (tmp_path / "checkpoints").glob("iter_*")] == ["iter_0000002"]
        (folder,) = checkpoint_folders(tmp_path)
        assert inspect_checkpoint(folder, read_files=True).is_valid
    assert number >= 5
