import os
from pathlib import Path

import pytest

from megatron_vlm.config import ConfigError
from megatron_vlm.platform.files.durable import folder_beside, open_durably, write_durably


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_durably(path, b"first")
    with pytest.raises(TypeError), open_durably(path) as stream:
        stream.writelines([b"half", 1])
    assert path.read_bytes() == b"first"
    with open_durably(path) as stream:
        stream.write(b"second")
    assert path.read_bytes() == b"second"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_folder_takes_its_place_when_all_is_written(tmp_path):
    with folder_beside(tmp_path / "a" / "folder") as unfinished:
        (unfinished / "file").write_text("content")
        assert not (tmp_path / "a" / "folder").exists()
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["folder"]
    assert [entry.name for entry in (tmp_path / "a" / "folder").iterdir()] == ["file"]


def test_nothing_is_left_of_a_folder_that_failed(tmp_path):
    with pytest.raises(FileNotFoundError), folder_beside(tmp_path / "folder") as unfinished:
        (unfinished / "file").rename(unfinished / "none" / "file")
    assert not list(tmp_path.iterdir())


def test_what_a_kill_has_left_is_not_taken_over(tmp_path):
    (tmp_path / "folder.tmp" / "old").mkdir(parents=True)
    (tmp_path / "folder.tmp" / "rest").write_text("half")
    with folder_beside(tmp_path / "folder") as unfinished:
        (unfinished / "file").write_text("content")
    assert [entry.name for entry in (tmp_path / "folder").iterdir()] == ["file"]


def test_a_second_process_is_refused_and_harms_nothing(tmp_path):
    with folder_beside(tmp_path / "folder") as unfinished:
        (unfinished / "file").write_text("content")
        with pytest.raises(ConfigError, match="another process writes this folder"), folder_beside(tmp_path / "folder"):
            pass
    assert [entry.name for entry in (tmp_path / "folder").iterdir()] == ["file"]


def test_a_link_to_an_empty_folder_is_filled_where_it_points_to(tmp_path):
    (tmp_path / "disk" / "folder").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "folder")
    with folder_beside(tmp_path / "link", is_new=True) as unfinished:
        (unfinished / "file").write_text("content")
    assert [entry.name for entry in (tmp_path / "disk" / "folder").iterdir()] == ["file"]
    assert (tmp_path / "link").is_symlink()


def test_a_mount_point_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "disk")
    with pytest.raises(ConfigError, match="output folder is a mount point"), folder_beside(tmp_path / "disk"):
        pass


def test_what_is_written_stays_where_its_place_was_taken_meanwhile(tmp_path):
    (tmp_path / "folder" / "there").mkdir(parents=True)
    with pytest.raises(OSError, match="not empty"), folder_beside(tmp_path / "folder") as unfinished:
        (unfinished / "file").write_text("content")
    assert (tmp_path / "folder.tmp" / "file").read_text() == "content"


def test_a_process_that_comes_when_a_folder_takes_its_place_harms_nothing(tmp_path, monkeypatch):
    replace = os.replace

    def second_comes_first(source, target):
        with pytest.raises(ConfigError), folder_beside(tmp_path / "folder", is_new=True):
            pass
        replace(source, target)
        with pytest.raises(ConfigError), folder_beside(tmp_path / "folder", is_new=True):
            pass

    monkeypatch.setattr(os, "replace", second_comes_first)
    with folder_beside(tmp_path / "folder", is_new=True) as unfinished:
        (unfinished / "file").write_text("content")
    assert [entry.name for entry in (tmp_path / "folder").iterdir()] == ["file"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_has_to_be_new_is_refused_where_something_is(tmp_path, kind):
    place = tmp_path / "place"
    if kind == "file":
        place.write_text("before")
    else:
        (place / "there").mkdir(parents=True)
    with pytest.raises(ConfigError, match="output folder is not empty"), folder_beside(place, is_new=True):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["place"]
