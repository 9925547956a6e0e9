import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest
import wheels
from wheels import fetch


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "downloads" / "some_thing-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("thing/data.json", "[1, 2]")
    return path


def test_half_unpacked_package_is_unpacked_again(wheel: Path) -> None:
    folder = fetch("some_thing-1.0", sha256_of(wheel), wheel.parent)
    assert (folder / "thing" / "data.json").read_text() == "[1, 2]"
    (folder / ".complete").unlink()
    (folder / "thing" / "data.json").write_text("[1,")
    assert (fetch("some_thing-1.0", sha256_of(wheel), wheel.parent) / "thing" / "data.json").read_text() == "[1, 2]"


def test_package_that_is_not_the_pinned_one_is_refused(wheel: Path) -> None:
    expected = sha256_of(wheel)
    wheel.write_bytes(b"something else")
    with pytest.raises(SystemExit, match="does not have the expected sha256; delete the file and run again"):
        fetch("some_thing-1.0", expected, wheel.parent)


def test_failed_download_is_one_line_that_names_the_package(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel.unlink()
    asked = []

    def fail(command: list[str], **options: object) -> subprocess.CompletedProcess:
        asked.append(command[-1])
        return subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: no route to host\n")

    monkeypatch.setattr(wheels.subprocess, "run", fail)
    with pytest.raises(SystemExit, match="some_thing-1.0 cannot be downloaded: ERROR: no route to host; check"):
        fetch("some_thing-1.0", "any", wheel.parent)
    assert asked == ["some_thing==1.0"]
