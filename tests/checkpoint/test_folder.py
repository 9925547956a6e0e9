import shutil

import pytest

from megatron_vlm.checkpoint.folder import checkpoint_path, clean_up, find_checkpoint, list_iterations, prune
from megatron_vlm.checkpoint.manifest import Manifest, checksum_file, write_manifest
from megatron_vlm.config import CheckpointError
from megatron_vlm.platform.files.durable import SET_ASIDE, UNFINISHED


def make(run_dir, *iterations):
    for iteration in iterations:
        path = checkpoint_path(run_dir, iteration)
        path.mkdir(parents=True)
        (path / "weights").write_bytes(b"content")
        files = {"weights": checksum_file(path / "weights")}
        write_manifest(path, Manifest(iteration=iteration, progress={}, files=files))


def cut_file(path):
    (path / "weights").write_bytes(b"half")


def lose_file(path):
    (path / "weights").unlink()


def lose_manifest(path):
    (path / "manifest.json").unlink()


def damage_manifest(path):
    (path / "manifest.json").write_text("{")


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
    (tmp_path / "checkpoints" / f"iter_0000006{UNFINISHED}").mkdir()
    (tmp_path / "checkpoints" / "notes").mkdir()
    assert list_iterations(tmp_path) == [5]


def test_the_newest_are_kept(tmp_path):
    make(tmp_path, 1, 2, 3, 4)
    prune(tmp_path, 2, saved=4)
    assert list_iterations(tmp_path) == [4, 3]


def test_zero_keeps_all(tmp_path):
    make(tmp_path, 1, 2, 3)
    prune(tmp_path, 0, saved=3)
    assert list_iterations(tmp_path) == [3, 2, 1]


@pytest.mark.parametrize("damage", [cut_file, lose_file, lose_manifest, damage_manifest])
@pytest.mark.parametrize("keep_last", [1, 2])
def test_damaged_checkpoints_do_not_count_among_those_that_are_kept(tmp_path, damage, keep_last):
    make(tmp_path, 1, 2, 3, 4, 5)
    for iteration in (3, 4, 5):
        damage(checkpoint_path(tmp_path, iteration))
    prune(tmp_path, keep_last, saved=5)
    assert list_iterations(tmp_path) == [5, 4, 3, 2, 1][: 3 + keep_last]
    assert find_checkpoint(checkpoint_path(tmp_path, 2)) == checkpoint_path(tmp_path, 2)


def test_a_newer_checkpoint_with_wrong_checksums_does_not_count_either(tmp_path):
    make(tmp_path, 100, 150, 200)
    (checkpoint_path(tmp_path, 200) / "weights").write_bytes(b"CONTENT")  # of the recorded size
    prune(tmp_path, 1, saved=150)
    assert list_iterations(tmp_path) == [200, 150]


def test_old_checkpoints_are_removed_whether_valid_or_not(tmp_path):
    make(tmp_path, 1, 2, 3)
    lose_file(checkpoint_path(tmp_path, 1))
    prune(tmp_path, 1, saved=3)
    assert list_iterations(tmp_path) == [3]


def test_clean_up_finishes_what_is_complete_and_removes_the_rest(tmp_path):
    make(tmp_path, 1, 2, 3)
    folder = tmp_path / "checkpoints"
    (folder / "iter_0000001").rename(folder / f"iter_0000001{SET_ASIDE}")
    (folder / "iter_0000002").rename(folder / f"iter_0000002{UNFINISHED}")
    shutil.copytree(folder / "iter_0000003", folder / f"iter_0000003{UNFINISHED}")
    (folder / f"iter_0000004{UNFINISHED}").mkdir()
    (folder / "iter_0000004.tmp").mkdir()
    clean_up(tmp_path)
    left = ["iter_0000001", "iter_0000002", "iter_0000003", "iter_0000004.tmp"]
    assert sorted(path.name for path in folder.iterdir()) == left


def test_clean_up_of_a_run_without_checkpoints_does_nothing(tmp_path):
    clean_up(tmp_path / "none")
    assert not list(tmp_path.iterdir())
