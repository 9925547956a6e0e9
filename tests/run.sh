#!/usr/bin/env bash
# Run the tests in .venv, which is made first where it is missing; arguments go to pytest.
#   bash tests/run.sh                    everything that needs no GPU and no minutes, two files at a time
#   bash tests/run.sh tests/data -x      one folder, stop at the first failure
#   bash tests/run.sh -m faults          every kind of fault (tests/support/fault_kinds.py); minutes
#   bash tests/run.sh -m matrix          every layout against one process
#   bash tests/run.sh -m gpu             the tests that need a GPU; all others do not see it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/setup_venv.sh
# The models of the tests are tiny and several processes share the cores: one thread each is fastest.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
case " $* " in *" gpu "*) ;; *) export CUDA_VISIBLE_DEVICES= ;; esac
# A file at a time in each of two processes, in the order of their names: the long ones do not come last.
if [ "$#" -eq 0 ]; then set -- -n 2 --dist loadfile --no-loadscope-reorder; fi
# The short tests of kinds of faults run always, and here again.
if [ "${1:-} ${2:-}" = "-m faults" ]; then set -- -m "faults or fault_kind" "${@:3}"; fi
printf '[tests] python -m pytest %s\n' "$*"
exec "${VENV:-.venv}/bin/python" -m pytest "$@"
