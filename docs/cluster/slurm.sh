#!/bin/bash
# A Ray cluster inside a Slurm allocation, one Ray node a machine, and one run on it:
#   sbatch docs/cluster/slurm.sh my.yaml run.dir=/shared/runs/my parallel.dp=auto parallel.cp=auto
# The environment with nsa-dist is active on every machine; run.dir is on storage that all see.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=B:TERM@300
set -euo pipefail

umask 077
RAY_AUTH_TOKEN=$(openssl rand -hex 32)
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
export RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=3000 RAY_health_check_failure_threshold=3
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))
run=$(printf '%s\n' "$@" | sed -n 's/^run\.dir=//p' | tail -n 1)

# --block: Ray ends with the step. The dashboard, and the Jobs API in it, stay on the head's loopback.
srun --nodes=1 --ntasks=1 --nodelist="$head" ray start --head --port="$port" --dashboard-host=127.0.0.1 --block &
sleep 15
if [ "$SLURM_NNODES" -gt 1 ]; then
  srun --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --exclude="$head" \
    ray start --address="$head:$port" --block &
fi

# A batch script runs on the allocation's first machine, which is the head.
trap 'nsa-dist stop "$(basename "$run")" --address http://127.0.0.1:8265' TERM
nsa-dist submit "$@" --wait --address http://127.0.0.1:8265
nsa-dist logs -f "$(basename "$run")" --address http://127.0.0.1:8265 &
wait $!
