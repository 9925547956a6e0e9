import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def merged(tmp_path):
    """Constraints of this environment merged with the given lines, by name."""

    def merge(*lines):
        (tmp_path / "constraints.txt").write_text("\n".join(lines) + "\n")
        command = [sys.executable, str(ROOT / "tools" / "image_constraints.py"), str(tmp_path / "constraints.txt")]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return output.splitlines()

    return merge


def test_installed_package_keeps_its_version_however_its_name_is_spelled(merged):
    lines = merged("PyYAML==0.0.1", "megatron_core==0.0.1")
    assert not [line for line in lines if line.endswith("==0.0.1")]
    assert [line for line in lines if line.startswith("pyyaml==")]


def test_package_that_is_missing_gets_our_version_with_its_marker(merged):
    line = 'not-installed-anywhere==1.2; python_version >= "3.11"'
    assert merged("# why", "", line)[-1] == line


def test_local_version_of_a_build_is_kept(merged):
    import torch

    assert f"torch=={torch.__version__}" in merged()


def test_constraints_pin_every_direct_dependency():
    setup = (ROOT / "setup.py").read_text()
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    names = set()
    for line in setup.splitlines():
        for quoted in line.split('"')[1::2]:
            if ">=" in quoted or quoted.startswith("types-"):
                names.add(quoted.split(">=")[0].split("[")[0].lower())
    names.discard("")
    assert {"torch", "megatron-core", "transformers", "pytest"} < names
    assert names <= pinned


def test_image_installs_every_dependency_but_torch_which_its_base_brings():
    setup, dockerfile = (ROOT / "setup.py").read_text(), (ROOT / "Dockerfile").read_text()
    block = setup[setup.index("install_requires=[") : setup.index("extras_require=")]
    names = set(re.findall(r'"([A-Za-z-]+)>=', block)) - {"torch"}
    assert "megatron-core" in names
    assert not {name for name in names if not re.search(rf"[ \n]{re.escape(name)}\b", dockerfile)}
