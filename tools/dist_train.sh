#!/usr/bin/env bash
# Trains on several GPUs: tools/dist_train.sh CONFIG GPUS [arguments of train.py]
# On several machines, run it on each machine with its number of GPUS:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=first-machine PORT=29500 tools/dist_train.sh CONFIG GPUS
# NODE_RANK counts the machines from 0, and MASTER_ADDR is the machine with rank 0.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "Usage: [NNODES=1 NODE_RANK=0 MASTER_ADDR=127.0.0.1 PORT=29500] $0 CONFIG GPUS [arguments of train.py]" >&2
    exit 2
fi
exec torchrun \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
    --nproc_per_node="$2" \
    "$(dirname "$0")/train.py" "$1" --launcher pytorch "${@:3}"
