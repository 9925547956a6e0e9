#!/usr/bin/env bash
# Run the tests against the real transformer-engine, on a machine without a GPU; arguments go to pytest.
#   bash tests/transformer_engine/run.sh         makes .venv-te (or $VENV_TE) first: 5.7 GB, 5 minutes
#   bash tests/transformer_engine/run.sh -k fp8  some of the tests
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export VENV_TE="${VENV_TE:-.venv-te}"
bash tests/transformer_engine/setup_venv.sh
# The modules are built on the CPU; torch.compile would look for a GPU.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" CUDA_VISIBLE_DEVICES= TORCHDYNAMO_DISABLE=1
if [ "$#" -eq 0 ]; then set -- -q; fi
printf '[transformer_engine] python -m pytest tests/transformer_engine %s\n' "$*"
exec "$VENV_TE/bin/python" -m pytest -p tests.transformer_engine.plugin tests/transformer_engine "$@"
