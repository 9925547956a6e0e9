#!/usr/bin/env bash
# Real weights on a CPU: train a projector between DINOv2 and SmolLM2 on 434 captioned pictures, and show what the model
# writes about 64 other pictures before and after.
#   bash examples/smolvlm/run.sh      about 30 minutes on 2 cores; 350 MB to download, 2 GB on the disk
# Run it again and it continues where it stopped. It needs apt-get and dpkg for the pictures (Debian, Ubuntu).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

output=runs/smolvlm
bash tools/setup_venv.sh
PATH="$(cd "${VENV:-.venv}" && pwd)/bin:$PATH"
export PATH PYTHONPATH="$PWD:$PWD/examples${PYTHONPATH:+:$PYTHONPATH}" CUDA_VISIBLE_DEVICES=

# Weights as Hugging Face folders, and pictures with captions.
python -m smolvlm.weights "$output/weights"
python -m smolvlm.captions "$output"

[ -e "$output/data/pairs/manifest.json" ] ||
  megatron-vlm prepare pairs --input "$output/raw/pairs" --output "$output/data/pairs" \
    --tokenizer "$output/weights/smollm2"
[ -e "$output/start/config.yaml" ] ||
  megatron-vlm convert from-hf --language "$output/weights/smollm2" --vision "$output/weights/dinov2" \
    --config examples/smolvlm/align.yaml --output "$output/start"

megatron-vlm train examples/smolvlm/align.yaml
for name in start align; do
  python -m smolvlm.measure run "$output/$name" "$output/raw/heldout.json" "$output/$name.json"
done
python -m smolvlm.measure show "$output/start.json" "$output/align.json" "$output/captions.html"
