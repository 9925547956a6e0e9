#!/usr/bin/env bash
# The whole path on real data, on this machine: download, prepare, train on 4 processes, kill, resume, convert, evaluate.
#   bash examples/quickstart/run.sh            about 20 minutes on 2 cores; ends with runs/quickstart/report.html
#   bash examples/quickstart/run.sh --smoke    the same path on 2 processes in 2 minutes, too short to be accurate
# Run again, it goes on where it stopped; --fresh starts over. The environment is .venv, made first where it is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

bash tools/setup_venv.sh
export PYTHONPATH="examples${PYTHONPATH:+:$PYTHONPATH}"
exec "${VENV:-.venv}/bin/python" -m quickstart "$@"
