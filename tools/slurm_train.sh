#!/usr/bin/env bash
# Train on a slurm cluster.
set -euo pipefail

if [[ $# -lt 3 ]]; then
    echo "Usage: $0 PARTITION JOB_NAME CONFIG [options of train.py]" >&2
    echo "Environment: GPUS=8 GPUS_PER_NODE=8 CPUS_PER_TASK=5 SIGNAL=TERM@300 SRUN_ARGS=" >&2
    exit 2
fi
GPUS=${GPUS:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-$((GPUS < 8 ? GPUS : 8))}
# SRUN_ARGS holds several words.
# shellcheck disable=SC2086
exec srun --partition="$1" --job-name="$2" \
    --ntasks="$GPUS" --ntasks-per-node="$GPUS_PER_NODE" \
    --gres=gpu:"$GPUS_PER_NODE" --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 --signal="${SIGNAL:-TERM@300}" ${SRUN_ARGS:-} \
    "${PYTHON:-python}" -u "$(dirname "$0")/train.py" "$3" --launcher slurm "${@:4}"
