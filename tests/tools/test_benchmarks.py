"""The benchmarks of the data path run, and say what was measured, against what, and whether it is enough."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "tools" / "benchmarks"


@pytest.mark.parametrize(
    ("command", "works"), [(["pack.py", "--samples", "20000"], 4), (["plan.py", "--images", "40000"], 2)]
)
def test_benchmark_writes_its_results(command, works, tmp_path):
    file = tmp_path / "results.json"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / command[0], *command[1:], "--json", str(file)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    results = json.loads(file.read_text())
    assert len(results) == len(done.stdout.splitlines()) == works
    for result in results:
        assert result.keys() == {"work", "unit", "ours", "peers", "ratio", "required", "met"}
        assert result["ours"] > 0
    assert all(result["met"] for result in results) is (done.returncode == 0)
