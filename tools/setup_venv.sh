#!/usr/bin/env bash
# Make the virtual environment .venv (or $VENV) with megatron_vlm, the test tools and transformers, at tested versions.
# When run again, it returns at once unless setup.py or constraints.txt has changed. $PYTHON chooses the interpreter and
# $EXTRAS the extras of setup.py; the slow tests of Ray need EXTRAS=dev,hf,ray.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv="${VENV:-.venv}"
extras="${EXTRAS:-dev,hf}"
cpu_index="https://download.pytorch.org/whl/cpu"
stamp_file="$venv/.megatron_vlm_installed"

say() { printf '[setup] %s\n' "$*"; }
fail() { printf '[setup] error: %s\n' "$*" >&2; exit 1; }

# Check that an interpreter runs: version managers put names on the PATH that only answer "not found".
is_supported() {
  "$1" -c 'import sys, ensurepip, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.10 python3; do
    if is_supported "$candidate"; then command -v "$candidate"; return; fi
  done
  fail "no Python 3.10, 3.11 or 3.12 with its venv module found; install one (Debian, Ubuntu: apt-get install python3-venv) or set PYTHON=/path/to/python"
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }

is_reachable() {
  "$venv/bin/python" - "$1" <<'PYTHON' >/dev/null 2>&1
import sys
import urllib.request

urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=5)
PYTHON
}

fingerprint() { { cat setup.py constraints.txt tools/setup_venv.sh; printf '%s' "$extras"; } | sha256sum | cut -d' ' -f1; }

wanted="$(fingerprint)"
if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp_file" 2>/dev/null)" = "$wanted" ]; then
  say "$venv is up to date"
  exit 0
fi

if ! is_supported "$venv/bin/python"; then
  if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then fail "$venv exists but is not a virtual environment; set VENV to another folder"; fi
  python="$(find_python)"
  say "making $venv with $python ($("$python" --version))"
  "$python" -m venv --clear "$venv"
fi
rm -f "$stamp_file"

# The default build of torch for Linux brings 4 GB of CUDA libraries, which a machine without a GPU does not need.
index=()
if has_gpu; then
  say "GPU found: installing the CUDA build of torch"
elif [ "$(uname -s)" = Linux ] && is_reachable "$cpu_index"; then
  say "no GPU found: installing the CPU build of torch"
  index=(--extra-index-url "$cpu_index")
else
  say "no GPU found: installing the default build of torch"
fi

say "installing megatron_vlm and its dependencies into $venv (a few minutes the first time)"
"$venv/bin/python" -m pip install --disable-pip-version-check --constraint constraints.txt \
  ${index[@]+"${index[@]}"} --editable ".[$extras]"
printf '%s\n' "$wanted" >"$stamp_file"
say "done: $("$venv/bin/python" -c 'import torch; print("torch", torch.__version__)')"
