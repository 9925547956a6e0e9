import errno
import fcntl

import pytest

from megatron_vlm.platform.files.locks import locked


def test_a_file_is_locked_once_at_a_time(tmp_path):
    with locked(tmp_path / "lock") as first:
        assert first is not None
        with locked(tmp_path / "lock") as second:
            assert second is None
    with locked(tmp_path / "lock") as again:
        assert again is not None


def test_a_file_that_was_removed_meanwhile_locks_nothing(tmp_path, monkeypatch):
    flock = fcntl.flock

    def removed_first(file, operation):
        (tmp_path / "lock").unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with locked(tmp_path / "lock") as file:
        assert file is None


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_about(tmp_path, monkeypatch, caplog, number):
    def unsupported(*args):
        raise OSError(number, "no locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked(tmp_path / "lock") as file:
        assert file is not None
    assert f"{tmp_path / 'lock'}: this file system has no locks" in caplog.text


def test_another_error_of_the_lock_is_raised(tmp_path, monkeypatch):
    def fails(*args):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(fcntl, "flock", fails)
    with pytest.raises(OSError, match="input/output error"), locked(tmp_path / "lock"):
        pass
