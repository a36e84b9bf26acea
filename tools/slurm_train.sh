#!/usr/bin/env bash
# Usage: bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG [WORK_DIR] [arguments of train.py]
# Environment: GPUS, GPUS_PER_NODE, CPUS_PER_TASK, SRUN_ARGS, PYTHON.
if [ $# -lt 3 ]; then
    echo 'slurm_train.sh: error: usage: slurm_train.sh PARTITION JOB_NAME CONFIG [WORK_DIR]' \
        '[arguments of train.py]' >&2
    exit 2
fi
TOOLS=$(cd "$(dirname "$0")" && pwd)
ARGS=("${@:4}")
# mmdet's script takes the work dir as a fourth word, mmseg's does not.
if [ $# -gt 3 ] && [ "${4#-}" = "$4" ]; then
    ARGS=(--work-dir "$4" "${@:5}")
fi

# SRUN_ARGS holds several words.
# shellcheck disable=SC2086
PYTHONPATH="$TOOLS/..:$PYTHONPATH" exec srun -p "$1" \
    --job-name="$2" \
    --gres=gpu:"${GPUS_PER_NODE:-8}" \
    --ntasks="${GPUS:-8}" \
    --ntasks-per-node="${GPUS_PER_NODE:-8}" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    $SRUN_ARGS \
    "${PYTHON:-python}" -u "$TOOLS/train.py" "$3" --launcher slurm "${ARGS[@]}"
