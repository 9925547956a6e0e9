import pytest

from megatron_vlm.checkpoint.folder import checkpoint_path, find_checkpoint, list_iterations, prune
from megatron_vlm.checkpoint.manifest import Manifest, write_manifest
from megatron_vlm.config import CheckpointError


def make(run_dir, *iterations):
    for iteration in iterations:
        path = checkpoint_path(run_dir, iteration)
        path.mkdir(parents=True)
        write_manifest(path, Manifest(iteration=iteration, progress={}, files={}))


def test_the_newest_complete_checkpoint_is_found(tmp_path):
    make(tmp_path, 5, 10, 15)
    (checkpoint_path(tmp_path, 15) / "manifest.json").unlink()
    assert find_checkpoint(tmp_path) == checkpoint_path(tmp_path, 10)


def test_a_checkpoint_names_itself(tmp_path):
    make(tmp_path, 5)
    assert find_checkpoint(checkpoint_path(tmp_path, 5)) == checkpoint_path(tmp_path, 5)


def test_a_folder_without_checkpoints_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no complete checkpoint found"):
        find_checkpoint(tmp_path)


def test_unfinished_and_foreign_folders_are_no_checkpoints(tmp_path):
    make(tmp_path, 5)
    (tmp_path / "checkpoints" / "iter_0000006.tmp").mkdir()
    (tmp_path / "checkpoints" / "notes").mkdir()
    assert list_iterations(tmp_path) == [5]


def test_the_newest_are_kept(tmp_path):
    make(tmp_path, 1, 2, 3, 4)
    prune(tmp_path, 2)
    assert list_iterations(tmp_path) == [4, 3]


def test_zero_keeps_all(tmp_path):
    make(tmp_path, 1, 2, 3)
    prune(tmp_path, 0)
    assert list_iterations(tmp_path) == [3, 2, 1]
