import multiprocessing
import multiprocessing.util
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from megatron_vlm.platform.launch.job_folder import job_folder, keep_helpers_in

HOLDER = """
import time
from megatron_vlm.platform.launch.job_folder import job_folder
with job_folder() as folder:
    (folder / "listener").touch()
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


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


def test_path_that_is_too_long_for_a_socket_is_not_used(temporary, monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_config", {})
    keep_helpers_in(temporary / ("x" * 100))
    assert not multiprocessing.current_process()._config
