#!/usr/bin/env bash
# Make .venv-quantised (or $VENV_QUANTISED) for the slow tests that load folders of 4 bits with transformers on a CPU:
# 350 MB and a few minutes, because it takes torch and the rest from .venv (or $VENV). gptqmodel compiles its kernel when
# it is first used, which needs a C++ compiler.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

venv="${VENV_QUANTISED:-.venv-quantised}" base="${VENV:-.venv}"
bash tools/setup_venv.sh
"$base/bin/python" -m venv --clear "$venv"
install() { "$venv/bin/python" -m pip install --disable-pip-version-check --quiet "$@"; }
packages() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
# Its own packages come first on the path, those of the other environment after them.
packages "$base" >"$(packages "$venv")/project.pth"
install --requirement tests/convert/transformers5.txt
install --no-deps --upgrade "setuptools>=77" wheel
install --no-deps --no-build-isolation --requirement tests/convert/quantised.txt
"$venv/bin/python" -c 'import gptqmodel, compressed_tensors as ct; print("[setup] done:", gptqmodel.__version__, ct.__version__)'
