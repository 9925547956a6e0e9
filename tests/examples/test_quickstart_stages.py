import hashlib
import json
import os
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
from quickstart import assets
from quickstart.assets import Package, fetch
from quickstart.logits import choose_samples
from quickstart.processes import find_rank
from quickstart.size import REAL, SMOKE
from quickstart.stages import count_processes, plan_stage

from megatron_vlm.config import DataError, StorageError, derive_layout

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", ["align", "pretrain", "sft"])
def test_stage_into_the_folder_of_the_yaml_files_needs_no_override(name: str) -> None:
    assert plan_stage(name, Path("runs/quickstart")).overrides == ()


@pytest.mark.parametrize("name", ["align", "pretrain", "sft"])
def test_stage_into_another_folder_reads_and_writes_only_there(name: str) -> None:
    config = plan_stage(name, Path("elsewhere/run")).load()
    paths = [config.run_dir, config.data.tokenizer, *(entry.path for entry in config.data.blend)]
    paths += [config.checkpoint.load_weights] if config.checkpoint.load_weights else []
    assert all(path.startswith("elsewhere/run/") for path in paths)


def test_stage_into_another_folder_keeps_the_proportions_of_the_blend() -> None:
    default, moved = (plan_stage("pretrain", Path(output)).load() for output in ("runs/quickstart", "elsewhere"))
    assert [entry.images for entry in moved.data.blend] == [entry.images for entry in default.data.blend] == [1.0, 1.0]


@pytest.mark.parametrize(("size", "number"), [(REAL, 4), (SMOKE, 2)])
@pytest.mark.parametrize("name", ["align", "pretrain", "sft"])
def test_every_stage_fits_the_processes_that_are_started(name: str, size: Any, number: int) -> None:
    stage = plan_stage(name, Path("elsewhere"), size.stage_overrides.get(name, ()))
    assert count_processes(stage.load()) == number
    assert derive_layout(stage.load(), number).data_parallel_size == 1
    assert stage.arguments[-2:] == ["--nproc-per-node", str(number)]


@pytest.mark.parametrize("size", [REAL, SMOKE])
def test_kill_comes_after_a_checkpoint_and_within_the_uninterrupted_run(size: Any) -> None:
    config = plan_stage("pretrain", Path("elsewhere"), size.stage_overrides.get("pretrain", ())).load()
    assert config.checkpoint.save_interval < size.kill_after < size.straight_iterations
    assert size.straight_iterations < config.training.train_iters
    assert size.kill_after % config.checkpoint.save_interval


def test_process_without_ranks_has_none() -> None:
    assert find_rank(os.getpid(), 0) is None


def test_logits_are_compared_on_one_to_three_pictures_of_the_whole_split() -> None:
    items = [{"image": f"{number}.png", "question": f"question {number}"} for number in range(80)]
    samples = choose_samples(items)
    assert [len(images) for images, _ in samples] == [1, 2, 3, 1, 2, 3, 1, 2]
    assert all(len(set(images)) == len(images) for images, _ in samples)
    assert [question for _, question in samples] == [f"question {number}" for number in range(0, 80, 10)]


def make_package(downloads: Path) -> Package:
    wheel = downloads / "thing-1.0-py3-none-any.whl"
    downloads.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("thing/data.json", json.dumps([1, 2]))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Package(name="thing", version="1.0", wheel=wheel.name, sha256=digest)


def test_downloaded_package_is_unpacked(tmp_path: Path) -> None:
    package = make_package(tmp_path / "downloads")
    folder = fetch(package, tmp_path / "downloads")
    assert json.loads((folder / "thing" / "data.json").read_text()) == [1, 2]


def test_half_unpacked_package_is_unpacked_again(tmp_path: Path) -> None:
    package = make_package(tmp_path / "downloads")
    folder = fetch(package, tmp_path / "downloads")
    (folder / ".complete").unlink()
    (folder / "thing" / "data.json").write_text("[1,")
    assert json.loads((fetch(package, tmp_path / "downloads") / "thing" / "data.json").read_text()) == [1, 2]


def test_package_that_is_not_the_pinned_one_is_refused(tmp_path: Path) -> None:
    package = make_package(tmp_path / "downloads")
    (tmp_path / "downloads" / package.wheel).write_bytes(b"something else")
    with pytest.raises(DataError, match="thing==1.0 has sha256 .*, expected .*delete the file"):
        fetch(package, tmp_path / "downloads")


def test_failed_download_is_one_line_that_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: no route to host\n")
    monkeypatch.setattr(assets.subprocess, "run", lambda *_, **__: failed)
    package = Package(name="thing", version="1.0", wheel="thing.whl", sha256="0" * 64)
    with pytest.raises(StorageError, match="thing==1.0 could not be downloaded: ERROR: no route to host"):
        fetch(package, tmp_path / "downloads")
