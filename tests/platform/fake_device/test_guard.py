import os
import stat

import pytest

from megatron_vlm.config import ConfigError
from megatron_vlm.platform.fake_device import guard
from tests.support.played_ranks import HAS_GUARD

pytestmark = pytest.mark.skipif(HAS_GUARD, reason="this torch has a guard for CUDA of its own")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "megatron_vlm"


def make_compiler(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_library_is_compiled_once_and_nothing_else_stays(cache, tmp_path, monkeypatch):
    compiler = make_compiler(
        tmp_path / "cc", f'echo >> {tmp_path}/calls; while [ "$1" != -o ]; do shift; done; : > "$2"'
    )
    monkeypatch.setenv("CXX", compiler)
    path = guard.build_guard()
    assert guard.build_guard() == path
    assert list(cache.iterdir()) == [path]
    assert (tmp_path / "calls").read_text().count("\n") == 1


def test_no_compiler_is_one_line_with_a_way_out(cache, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="needs a C\\+\\+ compiler once.*install g\\+\\+") as caught:
        guard.build_guard()
    assert "\n" not in str(caught.value)


def test_failing_compiler_is_named_with_its_first_error(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", make_compiler(tmp_path / "cc", "echo 'x.cpp:1: error: no such header' >&2; exit 1"))
    with pytest.raises(ConfigError, match="no such header.*install a C\\+\\+20 compiler"):
        guard.build_guard()
    assert not list(cache.iterdir())


def test_cache_of_a_home_that_cannot_be_written_is_a_temporary_folder(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr(guard.tempfile, "gettempdir", lambda: str(tmp_path))
    assert guard._cache_folder() == tmp_path / f"megatron_vlm_{os.getuid()}"


def test_loading_after_torch_is_refused():
    with pytest.raises(RuntimeError, match="before torch is imported"):
        guard.load_guard()


@pytest.mark.parametrize("taken", ["a file", "a folder that others may write to", "a link"])
def test_folder_in_a_shared_place_must_be_private(tmp_path, taken):
    folder = tmp_path / "shared"
    if taken == "a file":
        folder.write_text("")
    elif taken == "a link":
        folder.symlink_to(tmp_path)
    else:
        folder.mkdir()
        folder.chmod(0o777)
    with pytest.raises(ConfigError, match="not a private folder"):
        guard._private_folder(folder)
