import os

import pytest

from megatron_vlm.config import StorageError
from megatron_vlm.data.prepare.chunk import built_beside, discard


def test_a_folder_is_there_only_when_it_is_whole(tmp_path):
    with built_beside(tmp_path / "part", "work") as unfinished:
        (unfinished / "file").write_text("x")
        assert not (tmp_path / "part").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["part", "file"]


def test_whoever_was_faster_has_written_the_same_and_stays(tmp_path):
    with built_beside(tmp_path / "part", "work") as unfinished:
        (unfinished / "file").write_text("slower")
        (tmp_path / "part").mkdir()
        (tmp_path / "part" / "file").write_text("faster")
    assert (tmp_path / "part" / "file").read_text() == "faster"
    assert os.listdir(tmp_path) == ["part"]


def build_what_is_discarded(folder) -> None:
    with built_beside(folder, "work") as unfinished:
        (unfinished / "file").write_text("x")
        discard(unfinished)


def test_what_is_discarded_never_becomes_whole_though_its_process_goes_on(tmp_path):
    with pytest.raises(StorageError, match="work stopped: No such file.*finished input files are kept"):
        build_what_is_discarded(tmp_path / "part")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    with (
        pytest.raises(StorageError, match="work stopped: No such file or directory .*part"),
        built_beside(tmp_path / "none" / "part", "work"),
    ):
        pass


def test_what_discarding_left_behind_is_no_obstacle(tmp_path):
    for name in ("part.tmp", "part.tmp.gone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    discard(tmp_path / "part.tmp")
    assert os.listdir(tmp_path) == []
