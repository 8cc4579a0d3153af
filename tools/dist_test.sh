#!/usr/bin/env bash
# Evaluate a checkpoint on several GPUs or machines, as tools/dist_train.sh trains.
set -euo pipefail

if [[ $# -lt 3 ]]; then
    echo "Usage: $0 CONFIG CHECKPOINT GPUS [options of test.py]" >&2
    echo "Environment: NNODES=1 NODE_RANK=0 MASTER_ADDR=127.0.0.1 PORT=29500" >&2
    exit 2
fi
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${PORT:-29500}" \
    --nproc-per-node "$3" \
    "$(dirname "$0")/test.py" "$1" "$2" --launcher pytorch "${@:4}"
