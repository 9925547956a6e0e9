#!/usr/bin/env bash
# Make the virtual environment $VENV_TE: the CUDA build of torch and the real transformer-engine, for a machine without
# a GPU. Its torch extension is C++ and comes as a source package, which is compiled here.
# When run again, it returns at once unless setup.py, constraints.txt or requirements.txt has changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

venv="${VENV_TE:-.venv-te}"
requirements="tests/transformer_engine/requirements.txt"
stamp_file="$venv/.installed"
compiled_file="$venv/.compiled_for"
needed_gb=9 # 5.7 at the end; while it is made, also what is downloaded and compiled

say() { printf '[transformer_engine] %s\n' "$*"; }
fail() { printf '[transformer_engine] error: %s\n' "$*" >&2; exit 1; }

is_supported() {
  "$1" -c 'import sys, ensurepip, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.12 python3.11 python3.10 python3; do
    if is_supported "$candidate"; then command -v "$candidate"; return; fi
  done
  fail "no Python 3.10, 3.11 or 3.12 with its venv module found; install one or set PYTHON=/path/to/python"
}

check_disk() {
  local free_gb
  free_gb="$(df --output=avail -BG "$(dirname "$venv")" | tail -1 | tr -dc '0-9')"
  if [ "$free_gb" -lt "$needed_gb" ]; then
    fail "$venv needs $needed_gb GB while it is made, and $free_gb GB are free; free some or set VENV_TE to another disk"
  fi
}

ask() { "$venv/bin/python" -c "$1"; }
install() { "$venv/bin/python" -m pip install --disable-pip-version-check --quiet "$@"; }

# Every file of the extension includes the same large headers and takes half a minute. As one file, and without
# optimization, which it needs only to launch kernels, all of them take two.
unpack_as_one_file() {
  local version="$1" folder="$2" file
  "$venv/bin/python" -m pip download --disable-pip-version-check --quiet --no-deps --no-build-isolation \
    --no-binary :all: --dest "$folder" "transformer-engine-torch==$version"
  tar -xzf "$folder/transformer_engine_torch-$version.tar.gz" --strip-components 1 -C "$folder"
  find "$folder/csrc" -name '*.cpp' | sort | while read -r file; do
    mv "$file" "$file.part"
    printf '#include "%s"\n' "$file.part"
  done >"$folder/all.txt"
  mv "$folder/all.txt" "$folder/csrc/all.cpp"
  sed -i 's/"-O3"/"-O0"/' "$folder/build_tools/pytorch.py"
}

# The headers come from the packages that torch's CUDA build brings, not from a toolkit of the machine.
compile_extension() {
  local version="$1" site cuda sources
  site="$(ask 'import sysconfig; print(sysconfig.get_path("purelib"))')"
  cuda="$site/nvidia/cu13"
  [ -d "$cuda" ] || fail "torch $(ask 'import torch; print(torch.__version__)') brings no $cuda; this needs its build for CUDA 13"
  [ -e "$cuda/lib64" ] || ln -s lib "$cuda/lib64"
  sources="$(cd "$venv" && pwd)/transformer_engine_torch"
  rm -rf "$sources"
  mkdir "$sources"
  say "compiling the torch extension of transformer-engine $version (2 minutes)"
  unpack_as_one_file "$version" "$sources"
  # pip would keep the compiled package and hand it to a later torch.
  CUDA_HOME="$cuda" NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE \
    CPLUS_INCLUDE_PATH="$cuda/include/cccl:$cuda/include:$site/nvidia/cudnn/include:$site/nvidia/nccl/include" \
    install --no-cache-dir --no-build-isolation --no-deps --force-reinstall "$sources"
  rm -rf "$sources"
}

wanted="$(cat setup.py constraints.txt "$requirements" | sha256sum | cut -d' ' -f1)"
if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp_file" 2>/dev/null)" = "$wanted" ]; then exit 0; fi

command -v "${CXX:-c++}" >/dev/null || fail "no C++ compiler; install one (Debian, Ubuntu: apt-get install g++) or set CXX"
if ! is_supported "$venv/bin/python"; then
  if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then fail "$venv exists but is not a virtual environment; set VENV_TE"; fi
  check_disk
  python="$(find_python)"
  say "making $venv with $python ($("$python" --version))"
  "$python" -m venv --clear "$venv"
fi
rm -f "$stamp_file"

say "installing torch for CUDA, megatron_vlm and the test tools into $venv (3 GB to load)"
# Three equals signs leave out builds of this version with a suffix, such as +cpu, where pip is configured to find them.
install "torch===$(sed -n 's/^torch==//p' constraints.txt)"
install --constraint constraints.txt --editable ".[dev,hf]"
ask 'import sys, torch; sys.exit(torch.version.cuda is None)' ||
  fail "pip chose a build of torch without CUDA; set PYTHON to a version for which it finds the other, or PIP_INDEX_URL"
install --no-deps --requirement "$requirements"
version="$(sed -n 's/^transformer-engine==//p' "$requirements")"
built_for="$version $(ask 'import sys, torch; print(torch.__version__, sys.version.split()[0])')"
if [ "$(cat "$compiled_file" 2>/dev/null)" != "$built_for" ]; then
  compile_extension "$version"
  printf '%s\n' "$built_for" >"$compiled_file"
fi
printf '%s\n' "$wanted" >"$stamp_file"
say "done: torch $(ask 'import torch; print(torch.__version__)'), $(du -sh "$venv" | cut -f1)"
