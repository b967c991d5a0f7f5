#!/usr/bin/env bash
# One machine with several GPUs (or none): a worker for each, in a private Ray cluster that only this
# machine can reach and that ends with the run.
#
#   cluster/local.sh my.yaml
#   cluster/local.sh my.yaml train.steps=500 train.parallel=fsdp2
#   CUDA_VISIBLE_DEVICES=0,1 cluster/local.sh my.yaml
#
# Ctrl-C stops with a checkpoint; the same line goes on from there.
set -euo pipefail

[[ $# -ge 1 ]] || { echo "usage: cluster/local.sh RECIPE [FIELD=VALUE]..." >&2; exit 2; }
recipe=$1
shift

gpus() {
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    awk -F, '{print $1 == "" ? 0 : NF}' <<< "$CUDA_VISIBLE_DEVICES"
  elif command -v nvidia-smi > /dev/null; then
    nvidia-smi --list-gpus | wc -l
  else
    echo 0
  fi
}

count=$(gpus)
if [[ $count -gt 0 ]]; then
  shape=("cluster.workers=$count" cluster.gpus_per_worker=1)
else
  shape=("cluster.workers=$(nproc)" cluster.gpus_per_worker=0)
fi
echo "${shape[*]}"
# Fields of the command line come last, so they have the last word.
exec raymix train "$recipe" cluster.address=local "${shape[@]}" "$@"
