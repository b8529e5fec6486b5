#!/usr/bin/env bash
# evaluate.sh CHECKPOINT TASK [--dynamic ...]: as the original's, with GPUS processes (default 1) on this machine.
# MASTER_PORT is accepted and not needed: processes share the work through pipes.
set -eu
[ $# -ge 2 ] || { echo "usage: [GPUS=8] evaluate.sh CHECKPOINT TASK [--dynamic] [--max-num 6] ..." >&2; exit 2; }
checkpoint=$1
task=$2
shift 2
exec "${PYTHON:-python}" "$(dirname "$0")/evaluate.py" --model_name_or_path "$checkpoint" --task "$task" --processes "${GPUS:-1}" "$@"
