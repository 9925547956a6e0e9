#!/usr/bin/env bash
# Check format, lint and types of the whole tree in .venv, which is made first where it is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/setup_venv.sh
bin="${VENV:-.venv}/bin"
"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/mypy"
