#!/usr/bin/env bash
# Tests on several GPUs: tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of test.py]
# On several machines, run it on each machine with NNODES, NODE_RANK, MASTER_ADDR and PORT as in dist_train.sh.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "Usage: [NNODES=1 NODE_RANK=0 MASTER_ADDR=127.0.0.1 PORT=29500] $0 CONFIG CHECKPOINT GPUS [arguments of test.py]" >&2
    exit 2
fi
exec torchrun \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
    --nproc_per_node="$3" \
    "$(dirname "$0")/test.py" "$1" "$2" --launcher pytorch "${@:4}"
