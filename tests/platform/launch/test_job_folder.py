import multiprocessing
import multiprocessing.util
import subprocess
import sys
import tempfile
from multiprocessing.connection import Listener
from pathlib import Path

import pytest

from megatron_vlm.config import ConfigError
from megatron_vlm.platform.launch import job_folder as module
from megatron_vlm.platform.launch.job_folder import job_folder, keep_helpers_in

HOLDER = """
import time
from megatron_vlm.platform.launch.job_folder import job_folder
with job_folder() as folder:
    (folder / "listener").touch()
    print(folder, flush=True)
    time.sleep(60)
"""


LONG_NAME = "x" * 100


@pytest.fixture(autouse=True)
def temporary(monkeypatch):
    with tempfile.TemporaryDirectory(prefix="mv-") as folder:  # its path is short enough for sockets
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(folder)


@pytest.fixture
def too_long(temporary, monkeypatch):
    """A temporary folder whose path is too long for sockets, beside one that may take its place."""
    folder, short = temporary / LONG_NAME, temporary / "short"
    for each in (folder, short):
        each.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(module, "_SHORT_FOLDERS", (str(temporary / "missing"), str(short)))
    return folder


def test_folder_is_removed_with_all_that_is_in_it(temporary):
    with job_folder() as folder:
        (folder / "listener").touch()
        assert folder.parent == temporary
    assert not list(temporary.iterdir())


def test_folder_of_a_killed_launcher_is_removed_by_the_next_and_that_of_a_live_one_is_not(temporary):
    killed, live = (
        subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True) for _ in range(2)
    )
    try:
        folders = [Path(process.stdout.readline().strip()) for process in (killed, live)]
        (temporary / "megatron_vlm_notes").mkdir()
        killed.kill()
        killed.wait()
        with job_folder() as mine:
            assert set(temporary.iterdir()) == {mine, folders[1], temporary / "megatron_vlm_notes"}
    finally:
        for process in (killed, live):
            process.kill()
            process.communicate()


def test_folder_of_another_node_is_left_alone(temporary):
    folder = temporary / "megatron_vlm_theirs"
    folder.mkdir()
    (folder / "launcher_another-node.lock").touch()
    with job_folder():
        assert folder.is_dir()


def test_helpers_make_their_sockets_in_the_folder(temporary, monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_config", {})
    keep_helpers_in(temporary)
    assert multiprocessing.util.get_temp_dir() == str(temporary)
    assert multiprocessing.Process()._config["tempdir"] == str(temporary)  # a child inherits it


def test_folder_is_made_where_sockets_are_possible(too_long, temporary, monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_config", {})
    with job_folder() as folder:
        assert folder.parent == temporary / "short"
        keep_helpers_in(folder)
        Listener(family="AF_UNIX").close()
    with job_folder() as mine:  # it also removes here what a killed launcher has left
        assert list((temporary / "short").iterdir()) == [mine]


def test_process_without_a_launcher_makes_its_sockets_in_a_folder_that_it_removes(too_long, temporary):
    code = f"""
from multiprocessing.connection import Listener
from megatron_vlm.platform.launch import job_folder
job_folder._SHORT_FOLDERS = ({str(temporary / "short")!r},)
job_folder.keep_helpers_in(None)
print(Listener(family="AF_UNIX").address)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert Path(done.stdout).parents[1] == temporary / "short"
    assert not list((temporary / "short").iterdir())
    assert not list(too_long.iterdir())


PROCESS = """
import multiprocessing
from multiprocessing.connection import Listener
from megatron_vlm.platform.launch.job_folder import make_helpers_folder

def listen():
    print(make_helpers_folder())
    Listener(family="AF_UNIX")

if __name__ == "__main__":
    {call}
"""


@pytest.mark.parametrize("kind", ["this", "fork", "spawn"])
def test_process_that_makes_a_folder_for_helpers_leaves_nothing(temporary, kind):
    child = f"child = multiprocessing.get_context({kind!r}).Process(target=listen); child.start(); child.join()"
    script = temporary / "script.py"
    script.write_text(PROCESS.format(call="listen()" if kind == "this" else child))
    command = [sys.executable, str(script)]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert Path(made.strip()).parents[1] == temporary
    assert list(temporary.iterdir()) == [script]


def test_error_says_how_long_the_path_may_be(too_long, monkeypatch):
    monkeypatch.setattr(module, "_SHORT_FOLDERS", ())
    with pytest.raises(ConfigError, match=f"too long for sockets.*{LONG_NAME}.*at most 58 bytes"), job_folder():
        pass
