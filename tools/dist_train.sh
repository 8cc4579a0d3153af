#!/usr/bin/env bash
# Train on several GPUs, one process each; without a GPU, in processes on the CPU.
# On several machines: start it on each, NODE_RANK counting them from 0.
set -euo pipefail

if [[ $# -lt 2 ]]; then
    echo "Usage: $0 CONFIG GPUS [options of train.py]" >&2
    echo "Environment: NNODES=1 NODE_RANK=0 MASTER_ADDR=127.0.0.1 PORT=29500" >&2
    exit 2
fi
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${PORT:-29500}" \
    --nproc-per-node "$2" \
    "$(dirname "$0")/train.py" "$1" --launcher pytorch "${@:3}"
