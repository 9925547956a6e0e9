import errno
import fcntl
import socket
import subprocess
import sys

import pytest

from megatron_vlm.config import ConfigError, StorageError
from megatron_vlm.platform.files.run_folder import (
    CONFIG_NAME,
    LOCK_NAME,
    check_entries,
    hold_run_folder,
    read_run_folder,
)

HOLDER = """
import sys, time
from pathlib import Path
from megatron_vlm.platform.files.run_folder import hold_run_folder
with hold_run_folder(Path(sys.argv[1]), "slurm-7-0-1"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path / "run"."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_folder_is_made_with_its_parents(tmp_path):
    with hold_run_folder(tmp_path / "a" / "b", "test"):
        assert (tmp_path / "a" / "b").is_dir()


def test_second_job_is_refused_and_told_who_holds_the_folder(tmp_path, holder):
    with pytest.raises(
        ConfigError,
        match=rf"another job .*host {socket.gethostname()}, process {holder.pid}, job slurm-7-0-1, attempt 1 .*run_dir",
    ):
        with hold_run_folder(tmp_path / "run", "test"):
            pass


def test_folder_that_a_job_holds_is_not_read(tmp_path, holder):
    with pytest.raises(ConfigError, match=f"another job uses this run folder: .*process {holder.pid}.*wait for it"):
        with read_run_folder(tmp_path / "run"):
            pass


def test_reading_a_folder_changes_nothing_and_keeps_jobs_away(tmp_path):
    (tmp_path / CONFIG_NAME).touch()
    with read_run_folder(tmp_path):  # a run that was copied without its lock
        assert [path.name for path in tmp_path.iterdir()] == [CONFIG_NAME]
    with hold_run_folder(tmp_path, "test"):
        signed = (tmp_path / LOCK_NAME).read_text()
    with read_run_folder(tmp_path), read_run_folder(tmp_path):
        with pytest.raises(ConfigError, match="another job"):
            hold_run_folder(tmp_path, "other").__enter__()
    assert (tmp_path / LOCK_NAME).read_text() == signed


@pytest.mark.parametrize("name", ["checkpoints", "plan", "ledger", "tensorboard"])
def test_file_in_place_of_a_folder_of_the_run_is_refused(tmp_path, name):
    check_entries(tmp_path)
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match=rf"Not a directory \(.*/{name}\); fix: move away what stands there"):
        check_entries(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    check_entries(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).touch()
    with pytest.raises(StorageError, match="Not a directory"):
        check_entries(tmp_path)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "events.jsonl"])
def test_folder_in_place_of_a_file_of_the_run_is_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(StorageError, match=rf"Is a directory \(.*/{name}\); fix: move away what stands there"):
        check_entries(tmp_path)


def test_folder_is_free_once_its_holder_was_killed(tmp_path, holder):
    holder.kill()
    holder.wait()
    with hold_run_folder(tmp_path / "run", "test"):
        assert (tmp_path / "run").is_dir()


def test_attempts_on_a_run_are_counted(tmp_path):
    (tmp_path / CONFIG_NAME).touch()
    for attempt in (1, 2, 3):
        with hold_run_folder(tmp_path, "test"):
            assert f"job test, attempt {attempt}\n" in (tmp_path / LOCK_NAME).read_text()


def test_damaged_lock_is_taken_over(tmp_path):
    (tmp_path / LOCK_NAME).write_bytes(b"\xff\0attempt x")
    with hold_run_folder(tmp_path, "test"):
        assert (tmp_path / LOCK_NAME).read_text().endswith("attempt 1\n")


def test_nothing_is_left_where_no_run_began(tmp_path):
    with pytest.raises(ConfigError, match="refused"):
        with hold_run_folder(tmp_path / "runs" / "a", "test"):
            raise ConfigError("refused")
    assert not list(tmp_path.iterdir())


def test_other_files_stay_where_no_run_began(tmp_path):
    (tmp_path / "empty").mkdir()
    with hold_run_folder(tmp_path / "empty", "test"):
        pass
    with hold_run_folder(tmp_path / "run", "test"):
        (tmp_path / "run" / "exit_status.json").touch()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "empty",
        "run",
        "run/exit_status.json",
    ]


def test_folder_can_be_held_again_afterwards_but_not_twice_at_once(tmp_path):
    for _ in range(2):
        with hold_run_folder(tmp_path, "test"):
            with pytest.raises(ConfigError, match="another job"):
                hold_run_folder(tmp_path, "test").__enter__()


def test_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="run_dir is a file"):
        with hold_run_folder(tmp_path / "run", "test"):
            pass


def test_file_system_without_locks_is_warned_about(tmp_path, monkeypatch, caplog):
    def unsupported(*args):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with hold_run_folder(tmp_path, "test"):
        assert "has no locks" in caplog.text


def test_other_error_of_the_lock_is_raised(tmp_path, monkeypatch):
    def fails(*args):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(fcntl, "flock", fails)
    with pytest.raises(OSError, match="input/output error"):
        with hold_run_folder(tmp_path, "test"):
            pass
