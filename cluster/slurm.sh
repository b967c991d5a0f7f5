#!/usr/bin/env bash
# A Ray cluster inside a Slurm allocation, one node of it a machine, and a run on it:
#
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=32 --time=24:00:00 cluster/slurm.sh my.yaml
#   sbatch ... cluster/slurm.sh my.yaml train.steps=500 cluster.workers=32
#   raymix watch runs/my                  # on any machine that sees the run directory
#
# Submitted where `raymix` is on the PATH, in a directory that all machines see. Slurm's notice of
# the end of the time (SIGTERM, or SIGUSR1 with --signal) becomes a checkpoint; the same line goes on
# from there. Nobody is let in without the token, which lies in a file that only you can read.
#SBATCH --job-name=raymix
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --signal=B:USR1@180
set -euo pipefail

[[ $# -ge 1 ]] || { echo "usage: sbatch ... cluster/slurm.sh RECIPE [FIELD=VALUE]..." >&2; exit 2; }
[[ -n "${SLURM_JOB_NODELIST:-}" ]] || { echo "not inside a Slurm job: use sbatch" >&2; exit 2; }

umask 077
folder=$(mktemp -d "$PWD/.raymix-$SLURM_JOB_ID-XXXXXX")
python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$folder/token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$folder/token" RAY_USAGE_STATS_ENABLED=0

mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${machines[0]}
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 20000))
shape=(--num-cpus="${SLURM_CPUS_PER_TASK:-1}" --num-gpus="${SLURM_GPUS_ON_NODE:-0}")

driver=
trap 'jobs -p | xargs --no-run-if-empty kill 2>/dev/null || true; wait || true; rm -rf "$folder"' EXIT
# A run that is asked to stop writes a checkpoint first.
trap '[[ -z $driver ]] || kill -TERM "$driver"' USR1 TERM INT

echo "head: $head ($address:$port), ${#machines[@]} machines"
srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
  ray start --head --node-ip-address="$address" --port="$port" --dashboard-host=127.0.0.1 \
  "${shape[@]}" --block > "$folder/head.log" 2>&1 &
for machine in "${machines[@]:1}"; do
  srun --nodes=1 --ntasks=1 --nodelist="$machine" --overlap \
    ray start --address="$address:$port" "${shape[@]}" --block > "$folder/$machine.log" 2>&1 &
done

for _ in $(seq 120); do
  up=$(RAY_ADDRESS="$address:$port" raymix doctor --json 2>/dev/null \
    | python -c 'import json, sys; print(json.load(sys.stdin)["checks"][-1]["found"])' || true)
  [[ $up == *": ${#machines[@]} nodes"* ]] && break
  sleep 5
done
echo "cluster: $up"

RAY_ADDRESS="$address:$port" raymix train "$@" &
driver=$!
code=0
# A trapped signal ends `wait` before the run has ended.
while kill -0 "$driver" 2>/dev/null; do
  wait "$driver" && code=0 || code=$?
done
exit "$code"
