#!/bin/sh
# Mini-Monkey from InternVL2-2B: the language model learns, on tiles of two scales. Variables and arguments: see run.sh.
# The learning rate is the published one.
set -eu
SHELL_DIR=$(cd "$(dirname "$0")/../../internvl2/shell" && pwd)

: "${MODEL:=OpenGVLab/InternVL2-2B}" "${OUTPUT_DIR:=work_dirs/minimonkey_full}"
METHOD=full
CONV_STYLE=internlm2-chat
DEFAULT_GPUS=8
DEFAULT_BATCH_SIZE=32
DEFAULT_PER_DEVICE_BATCH_SIZE=2
LEARNING_RATE=4e-9
WEIGHT_DECAY=0.01
DROP_PATH_RATE=0.1
MAX_SEQ_LENGTH=8192
SHARDING=stage3
set -- --freeze_mlp True --multi_scale training --max_dynamic_patch 8 --save_steps 1000 --save_total_limit 1 "$@"

. "$SHELL_DIR/run.sh"
