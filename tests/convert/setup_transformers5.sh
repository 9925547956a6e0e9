#!/usr/bin/env bash
# Make .venv-transformers5 (or $VENV_TRANSFORMERS5) for the slow tests that load an exported folder with transformers 5:
# 300 MB and a minute, because it takes everything else from .venv (or $VENV).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

venv="${VENV_TRANSFORMERS5:-.venv-transformers5}" base="${VENV:-.venv}"
bash tools/setup_venv.sh
"$base/bin/python" -m venv --clear "$venv"
"$venv/bin/python" -m pip install --disable-pip-version-check --quiet --requirement tests/convert/transformers5.txt
# Its own packages come first on the path, those of the other environment after them.
packages() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
packages "$base" >"$(packages "$venv")/project.pth"
"$venv/bin/python" -c 'import transformers; print("[setup] done: transformers", transformers.__version__)'
