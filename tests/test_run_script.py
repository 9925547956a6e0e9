"""tests/run.sh with a stand-in for Python."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PYTHON = '#!/bin/sh\necho "sees <${CUDA_VISIBLE_DEVICES-all}>"\n'


@pytest.mark.parametrize(
    ("arguments", "seen"), [((), ""), (("tests/data", "-x"), ""), (("-m", "slow"), ""), (("-m", "gpu"), "0")]
)
def test_only_tests_of_a_gpu_see_one(tmp_path, arguments, seen):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tools").mkdir()
    shutil.copy(Path(__file__).with_name("run.sh"), tmp_path / "tests")
    (tmp_path / "tools" / "setup_venv.sh").write_text("")
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = {**os.environ, "VENV": str(tmp_path / "venv"), "CUDA_VISIBLE_DEVICES": "0"}
    command = ["bash", str(tmp_path / "tests" / "run.sh"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"sees <{seen}>"
