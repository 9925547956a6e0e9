#!/bin/bash
# Submit the three stages of a model at once; each waits until the one before has ended with exit code 0, however often
# that is requeued. What the stages that follow a failed one waited for will not come: SLURM cancels them.
#   bash examples/slurm/stages.sh                                   # examples/vila_7b
#   bash examples/slurm/stages.sh examples/vila_7b --nodes=8 --account=vision     # options of sbatch for all of them
# In a container: CONTAINER_IMAGE=... as in pretrain.sbatch. A stage that is complete ends at once, so that the same
# command goes on where a chain was broken.
set -euo pipefail

configs="${1:-examples/vila_7b}"
script="$(dirname "${BASH_SOURCE[0]}")/pretrain.sbatch"
before=()
for stage in align pretrain sft; do
  # The guard is for bash before 4.4, where an empty array counts as unset.
  job=$(sbatch --parsable --job-name="$(basename "$configs")-$stage" ${before[@]+"${before[@]}"} "${@:2}" \
    "$script" "$configs/$stage.yaml")
  job="${job%%;*}"  # on federated clusters, the name of the cluster follows
  echo "$stage: job $job"
  before=(--dependency="afterok:$job" --kill-on-invalid-dep=yes)
done
