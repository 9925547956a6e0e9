#!/usr/bin/env bash
# Test exports on servers that this project did not write, on a CPU; each server gets an environment of its own.
#   bash tests/serving/run.sh                         all three: 3.5 GB, several minutes to install
#   bash tests/serving/run.sh vllm llama_cpp          some: vllm (3 GB), llama_cpp (200 MB), lmms_eval (beside .venv)
#   bash tests/serving/run.sh --envs DIR              environments in DIR instead of .venv-serving-*
#   bash tests/serving/run.sh --quickstart DIR        the quickstart's runs (default: runs/quickstart)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

servers=()
while [ "$#" -gt 0 ]; do
  case "$1" in
    --envs) mkdir -p "$2"; SERVING_ENVS="$(cd "$2" && pwd)"; export SERVING_ENVS; shift 2 ;;
    --quickstart) QUICKSTART="$(cd "$2" && pwd)"; export QUICKSTART; shift 2 ;;
    vllm|llama_cpp|lmms_eval) servers+=("$1"); shift ;;
    *) printf '[serving] error: unknown argument %s; choose from vllm, llama_cpp, lmms_eval\n' "$1" >&2; exit 64 ;;
  esac
done
if [ "${#servers[@]}" -eq 0 ]; then servers=(vllm llama_cpp lmms_eval); fi

bash tools/setup_venv.sh
base="${VENV:-.venv}"

say() { printf '[serving] %s\n' "$*"; }
packages() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

# vLLM pins another torch build than the one that an index offers by default; two of its dependencies are for CUDA.
install_vllm() {
  "$1/bin/python" -m pip install --disable-pip-version-check --quiet --extra-index-url https://download.pytorch.org/whl/cpu \
    --requirement tests/serving/vllm.txt
  "$1/bin/python" -m pip uninstall --quiet --yes torchaudio torchcodec
}

install_llama_cpp() {
  "$1/bin/python" -m pip install --disable-pip-version-check --quiet --requirement tests/serving/llama_cpp.txt
}

# torch, transformers and most of the rest come from this project's environment, after its own packages on the path.
install_lmms_eval() {
  "$1/bin/python" -m pip install --disable-pip-version-check --quiet --no-deps --requirement tests/serving/lmms_eval.txt
  packages "$base" >"$(packages "$1")/project.pth"
}

for server in "${servers[@]}"; do
  venv="${SERVING_ENVS:+$SERVING_ENVS/$server}"
  venv="${venv:-.venv-serving-$server}"
  wanted="$(sha256sum "tests/serving/$server.txt" | cut -d' ' -f1)"
  if [ "$(cat "$venv/.installed" 2>/dev/null)" = "$wanted" ]; then say "$venv is up to date"; continue; fi
  say "making $venv"
  if "$base/bin/python" -m venv --clear "$venv" && "install_$server" "$venv"; then
    printf '%s\n' "$wanted" >"$venv/.installed"
  else
    say "$server cannot be installed: its tests are skipped"
    rm -rf "$venv"
  fi
done

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" CUDA_VISIBLE_DEVICES=
files=("${servers[@]/#/tests/serving/test_}")
exec "$base/bin/python" -m pytest -m slow -s -rs --show-capture=no "${files[@]/%/.py}"
