#!/usr/bin/env bash
# Trains under Slurm: tools/slurm_train.sh PARTITION JOB_NAME CONFIG [arguments of train.py]
# Environment variables and their defaults: GPUS (8) is the total number of tasks, one per GPU; GPUS_PER_NODE (8);
# CPUS_PER_TASK (5); MASTER_PORT (29500); SRUN_ARGS has further arguments of srun, such as
# "--time=24:00:00 --account=mine".
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "Usage: [GPUS=8 GPUS_PER_NODE=8 CPUS_PER_TASK=5 SRUN_ARGS=...] $0 PARTITION JOB_NAME CONFIG [arguments of train.py]" >&2
    exit 2
fi
GPUS=${GPUS:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
if [ "$GPUS_PER_NODE" -gt "$GPUS" ]; then
    GPUS_PER_NODE=$GPUS
fi
# SRUN_ARGS is split into words on purpose
# shellcheck disable=SC2086
exec srun --partition="$1" --job-name="$2" \
    --ntasks="$GPUS" --ntasks-per-node="$GPUS_PER_NODE" --gres="gpu:$GPUS_PER_NODE" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    python -u "$(dirname "$0")/train.py" "$3" --launcher slurm "${@:4}"
