#!/usr/bin/env bash
# The whole path on real data, on this machine: download, prepare, train on 4 processes, kill, resume, convert, evaluate.
#   bash examples/quickstart/run.sh            about 20 minutes on 2 cores
#   bash examples/quickstart/run.sh --smoke    the same path on 2 processes in 2 minutes, too short to be accurate
# Run it again and it continues where it stopped; --fresh starts over. --output DIR replaces runs/quickstart.
# It makes the environment .venv if there is none; with --installed it uses the megatron-vlm on the PATH instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

usage() { printf 'usage: run.sh [--smoke] [--fresh] [--output DIR] [--installed]\n'; }
output='' smoke='' fresh='' installed=''
while [ "$#" -gt 0 ]; do
  case "$1" in
    --smoke) smoke=--smoke ;;
    --fresh) fresh=yes ;;
    --installed) installed=yes ;;
    --output) output="${2:?--output needs a folder}" && shift ;;
    --help | -h) usage && exit 0 ;;
    *) printf 'unknown option %s; ' "$1" >&2 && usage >&2 && exit 64 ;;
  esac
  shift
done

# The only differences between the real run and the smoke run.
if [ -z "$smoke" ]; then
  output="${output:-runs/quickstart}" processes=4 kill_after=70 straight_iterations=90
  align=() pretrain=() sft=()
else
  output="${output:-runs/quickstart-smoke}" processes=2 kill_after=7 straight_iterations=10
  # Starting processes takes most of the time of such a short run, so it has half as many.
  align=(parallel.pipeline_model_parallel_size=1 training.train_iters=5)
  pretrain=(parallel.pipeline_model_parallel_size=1 training.train_iters=12 checkpoint.save_interval=5)
  sft=(parallel.pipeline_model_parallel_size=1 training.train_iters=8)
fi

if [ -z "$installed" ]; then
  bash tools/setup_venv.sh
  PATH="$(cd "${VENV:-.venv}" && pwd)/bin:$PATH"
fi
# The models are small and in float32: four processes on the CPU, also on a machine with a GPU or two.
export CUDA_VISIBLE_DEVICES=
export PATH PYTHONPATH="$PWD:$PWD/examples${PYTHONPATH:+:$PYTHONPATH}"

if [ -n "$fresh" ] && [ -d "$output" ]; then
  find "$output" -mindepth 1 -maxdepth 1 ! -name downloads -exec rm -rf {} +
fi
mkdir -p "$output/done" "$output/logs"

# The YAML files name runs/quickstart. For another folder, copies of them name that one.
configs=examples/quickstart
if [ "$output" != runs/quickstart ]; then
  configs="$output/configs"
  mkdir -p "$configs"
  for file in examples/quickstart/*.yaml; do
    sed "s|runs/quickstart|$output|" "$file" >"$configs/${file##*/}"
  done
fi
settings="$(cat "$configs"/*.yaml | cksum) $smoke"
if [ "$(cat "$output/settings" 2>/dev/null || printf '%s' "$settings")" != "$settings" ]; then
  printf 'error: %s holds a run with other settings; start over with --fresh, or choose another --output\n' "$output" >&2
  exit 64
fi
printf '%s' "$settings" >"$output/settings"

# step NAME COMMAND...: run a command unless it is done, and keep its output in a log.
step() {
  local name="$1" begin="$SECONDS" code=0
  shift
  if [ -e "$output/done/$name" ]; then
    printf '[%s] done before\n' "$name"
    return
  fi
  printf '[%s] %s\n' "$name" "$*"
  "$@" 2>&1 | tee -ia "$output/logs/$name.log" || code="$?"
  if [ "$code" -ne 0 ]; then
    printf '[%s] ended with exit code %d; log: %s; run the script again to continue\n' "$name" "$code" "$output/logs/$name.log" >&2
    exit "$code"
  fi
  printf '%d\n' "$((SECONDS - begin))" >"$output/done/$name"
}

# Raw data: easy-vqa as COYO, MMC4 and LLaVA files, and a SentencePiece model.
step corpora python -m quickstart.corpora "$output" $smoke

# Raw data to shards; no system prompt, because a small model has better uses for its tokens.
step prepare_coyo megatron-vlm prepare pairs --input "$output/raw/coyo" \
  --output "$output/data/coyo" --tokenizer "$output/tokenizer.model"
step prepare_mmc4 megatron-vlm prepare interleaved --input "$output/raw/mmc4" --images "$output/raw/mmc4/images" \
  --output "$output/data/mmc4" --tokenizer "$output/tokenizer.model"
step prepare_llava megatron-vlm prepare conversations --input "$output/raw/llava/instructions.json" \
  --images "$output/raw/llava" --system none \
  --output "$output/data/llava" --tokenizer "$output/tokenizer.model"
for name in coyo mmc4 llava; do
  step "verify_$name" megatron-vlm data verify "$output/data/$name"
done

# Stage 1.
step align megatron-vlm train "$configs/align.yaml" "${align[@]}" --nproc-per-node "$processes"

# Stage 2 runs three times: its first iterations uninterrupted; then with one rank killed by kill -9; then the same
# command again, which resumes. Its losses must equal those of the uninterrupted run bit for bit.
step pretrain_straight megatron-vlm train "$configs/pretrain.yaml" "${pretrain[@]}" --nproc-per-node "$processes" \
  run_dir="$output/pretrain_straight" training.exit_iteration="$straight_iterations"
step pretrain_killed python -m quickstart.kill "$output/pretrain" --rank 1 --after "$kill_after" \
  --facts "$output/pretrain_killed.json" -- \
  megatron-vlm train "$configs/pretrain.yaml" "${pretrain[@]}" --nproc-per-node "$processes"
step pretrain megatron-vlm train "$configs/pretrain.yaml" "${pretrain[@]}" --nproc-per-node "$processes"

# Stage 3.
step sft megatron-vlm train "$configs/sft.yaml" "${sft[@]}" --nproc-per-node "$processes"

# Export to Hugging Face, and compare the logits on both sides.
step convert megatron-vlm convert to-hf "$output/sft" --format llava --output "$output/huggingface"
step logits_here python -m quickstart.logits write "$output/sft" "$output/raw/test.json" "$output/logits.npz"
step logits_transformers python -m quickstart.logits compare "$output/huggingface" "$output/logits.npz" "$output/logits.json"

# All questions of the test split; then the same questions, each with a wrong picture.
step evaluate megatron-vlm evaluate "$output/sft" --task vqa --questions "$output/raw/test.json" \
  --system none --max-new-tokens 4 --output "$output/evaluate.json"
step evaluate_another_picture megatron-vlm evaluate "$output/sft" --task vqa --questions "$output/raw/test.json" \
  --system none --max-new-tokens 4 --output "$output/evaluate_another_picture.json" --swap-images 0

for name in align pretrain sft; do
  step "report_$name" megatron-vlm report "$output/$name"
done
python -m quickstart.check "$output" $smoke
