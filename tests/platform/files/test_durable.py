import errno
import itertools
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_vlm.config import ConfigError, StorageError
from megatron_vlm.platform.files.durable import (
    SET_ASIDE,
    STORAGE_ERRNOS,
    UNFINISHED,
    discard,
    folder_beside,
    folder_once,
    open_durably,
    remove_abandoned,
    replace_folder,
    settle_folder,
    storage_errors,
    write_durably,
)


def fill(folder: Path, content: str) -> None:
    folder.mkdir(parents=True)
    (folder / "file").write_text(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_durably(path, b"first")
    with pytest.raises(TypeError), open_durably(path) as stream:
        stream.writelines([b"half", 1])
    assert path.read_bytes() == b"first"
    assert names(tmp_path) == ["file"]
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
    (tmp_path / f"folder{UNFINISHED}" / "old").mkdir(parents=True)
    (tmp_path / f"folder{UNFINISHED}" / "rest").write_text("half")
    with folder_beside(tmp_path / "folder") as unfinished:
        (unfinished / "file").write_text("content")
    assert [entry.name for entry in (tmp_path / "folder").iterdir()] == ["file"]


def test_what_a_user_keeps_beside_a_folder_stays(tmp_path):
    fill(tmp_path / "folder.tmp", "theirs")
    (tmp_path / "folder.lock").write_text("theirs")
    before = names(tmp_path)
    for content in ("old", "new"):
        with folder_beside(tmp_path / "folder", replaces=True) as unfinished:
            (unfinished / "file").write_text(content)
    write_durably(tmp_path / "file", b"ours")
    assert names(tmp_path) == sorted([*before, "file", "folder"])
    assert (tmp_path / "folder.tmp" / "file").read_text() == "theirs"


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
    assert (tmp_path / f"folder{UNFINISHED}" / "file").read_text() == "content"


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


def test_a_shared_file_is_written_under_a_name_of_each_process(tmp_path):
    with open_durably(tmp_path / "file", is_shared=True) as stream:
        stream.write(b"content")
        (unfinished,) = names(tmp_path)
        assert str(os.getpid()) in unfinished
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("there", ["folder", "file", "nothing"])
def test_what_is_there_is_replaced(tmp_path, there):
    place = tmp_path / "place"
    if there == "folder":
        fill(place, "old")
    elif there == "file":
        place.write_text("old")
    with folder_beside(place, replaces=True) as unfinished:
        (unfinished / "file").write_text("new")
    assert (place / "file").read_text() == "new"
    assert names(tmp_path) == ["place"]


class Killed(BaseException):
    pass


def kill_before_call(monkeypatch, number: int) -> None:
    """Raise in place of the given call, counted from 0, that renames or removes something."""
    calls = itertools.count()

    def counted(function):
        def call(*args, **kwargs):
            if next(calls) == number:
                raise Killed
            return function(*args, **kwargs)

        return call

    for module, name in ((os, "replace"), (os, "rename"), (shutil, "rmtree")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))


@pytest.mark.parametrize(("number", "content"), [(0, "old"), (1, "new"), (2, "new")])
def test_a_replacement_that_was_killed_at_any_step_loses_nothing(tmp_path, monkeypatch, number, content):
    place = tmp_path / "place"
    fill(place, "old")
    fill(tmp_path / f"place{UNFINISHED}", "new")
    with monkeypatch.context() as patch:
        kill_before_call(patch, number)
        with pytest.raises(Killed):
            replace_folder(place)
    settle_folder(place)
    assert (place / "file").read_text() == content
    assert [name for name in names(tmp_path) if name != f"place{UNFINISHED}"] == ["place"]


def test_the_old_folder_comes_back_where_there_is_no_new_one(tmp_path):
    fill(tmp_path / f"place{SET_ASIDE}", "old")
    settle_folder(tmp_path / "place")
    assert (tmp_path / "place" / "file").read_text() == "old"
    assert names(tmp_path) == ["place"]


def test_a_folder_that_is_made_once_takes_its_place(tmp_path):
    with folder_once(tmp_path / "folder") as unfinished:
        (unfinished / "file").write_text("content")
        assert names(tmp_path) == [unfinished.name]
    assert names(tmp_path) == ["folder"]


def test_the_first_to_make_a_folder_wins(tmp_path):
    with folder_once(tmp_path / "folder") as unfinished:
        (unfinished / "file").write_text("second")
        fill(tmp_path / "folder", "first")
    assert (tmp_path / "folder" / "file").read_text() == "first"
    assert names(tmp_path) == ["folder"]


def test_nothing_is_left_of_a_folder_that_could_not_take_its_place(tmp_path):
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(OSError, match="directory"), folder_once(tmp_path / "folder"):
        pass
    assert names(tmp_path) == ["folder"]


def build_what_is_discarded(folder: Path) -> None:
    with folder_once(folder) as unfinished:
        (unfinished / "file").write_text("x")
        discard(unfinished)


def test_what_is_discarded_never_becomes_whole_though_its_process_goes_on(tmp_path):
    with pytest.raises(FileNotFoundError):
        build_what_is_discarded(tmp_path / "folder")
    assert names(tmp_path) == []


def test_leftovers_of_discarding_are_no_obstacle(tmp_path):
    fill(tmp_path / f"folder{UNFINISHED}", "x")
    fill(tmp_path / f"folder{UNFINISHED}.gone", "x")
    discard(tmp_path / f"folder{UNFINISHED}")
    assert names(tmp_path) == []


def test_an_error_of_storage_says_what_stopped_and_what_to_do(tmp_path):
    with pytest.raises(StorageError, match=r"work stopped: No such file .*none.*fix: check the disk.*; parts are kept"):
        with storage_errors("work stopped", tmp_path, kept="parts are kept"):
            (tmp_path / "none").read_bytes()


def test_other_errors_stay_as_they_are_where_only_some_are_wanted(tmp_path):
    with pytest.raises(FileNotFoundError), storage_errors("work stopped", tmp_path, only=STORAGE_ERRNOS):
        (tmp_path / "none").read_bytes()
    with pytest.raises(StorageError, match=r"work stopped: .* \(.*\); fix: make room"):
        with storage_errors("work stopped", tmp_path, only=STORAGE_ERRNOS, fix="make room"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def leave_unfinished(folder: Path, name: str, seconds_ago: int = 0) -> Path:
    path = folder / f"name.{name}{UNFINISHED}"
    fill(path, "half")
    os.utime(path, (time.time() - seconds_ago,) * 2)
    return path


def test_what_killed_processes_left_is_removed(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    leave_unfinished(tmp_path, f"{socket.gethostname()}.{gone.pid}")
    leave_unfinished(tmp_path, "another.host.17", seconds_ago=7200)
    leave_unfinished(tmp_path, "unknown", seconds_ago=7200)
    remove_abandoned(tmp_path)
    assert names(tmp_path) == []


def test_what_other_processes_are_writing_stays(tmp_path):
    writing = [
        leave_unfinished(tmp_path, f"{socket.gethostname()}.{os.getppid()}"),
        leave_unfinished(tmp_path, "another.host.17"),
    ]
    remove_abandoned(tmp_path)
    assert names(tmp_path) == sorted(path.name for path in writing)


def test_what_another_users_process_is_writing_stays(tmp_path, monkeypatch):
    def is_anothers(process, number):
        raise PermissionError

    monkeypatch.setattr(os, "kill", is_anothers)
    left = leave_unfinished(tmp_path, f"{socket.gethostname()}.1")
    remove_abandoned(tmp_path)
    assert names(tmp_path) == [left.name]
