#!/usr/bin/env bash
# Usage: bash tools/dist_test.sh CONFIG CHECKPOINT PROCESSES [arguments of test.py]
# PROCESSES is the number of GPUs, or of CPU processes on a machine without CUDA.
# Environment: NNODES, NODE_RANK, MASTER_ADDR, PORT, PYTHON.
if [ $# -lt 3 ]; then
    echo 'dist_test.sh: error: usage: dist_test.sh CONFIG CHECKPOINT PROCESSES' \
        '[arguments of test.py]' >&2
    exit 2
fi
TOOLS=$(cd "$(dirname "$0")" && pwd)
VENV_PYTHON="$TOOLS/../.venv/bin/python"
if [ -z "$PYTHON" ] && [ -z "$VIRTUAL_ENV$CONDA_PREFIX" ] && [ -x "$VENV_PYTHON" ]; then
    PYTHON=$VENV_PYTHON
fi

PYTHONPATH="$TOOLS/..:$PYTHONPATH" exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$3" \
    "$TOOLS/test.py" "$1" "$2" --launcher pytorch "${@:4}"
