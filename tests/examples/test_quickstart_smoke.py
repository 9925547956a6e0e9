import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from quickstart.assets import EASY_VQA, MISTRAL_COMMON, fetch

from megatron_vlm.config import StorageError

ROOT = Path(__file__).resolve().parents[2]
DOWNLOADS = ROOT / "runs" / "quickstart" / "downloads"


def run_quickstart(output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "examples")}
    command = [sys.executable, "-m", "quickstart", "--smoke", "--output", str(output), *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def packages() -> None:
    try:
        for package in (EASY_VQA, MISTRAL_COMMON):
            fetch(package, DOWNLOADS)
    except StorageError as error:
        pytest.skip(f"the package index is out of reach: {error}")


@pytest.mark.distributed
def test_smoke_run_goes_the_whole_way_and_is_not_done_twice(packages: None, tmp_path: Path) -> None:
    first = run_quickstart(tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["smoke"]
    assert summary["resume_bit_equal"]
    assert summary["max_logit_difference"] <= 1e-4
    assert 0.5 < min(summary["packing_utilisation"].values())
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert str(tmp_path / "report.html") in first.stdout

    second = run_quickstart(tmp_path)
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count("done before") == len(summary["seconds"]) + 1  # and the download
