#!/bin/sh
# InternVL2-26B: projector and language model learn, the rest is frozen. Variables and arguments: see ../../run.sh.
set -eu
SHELL_DIR=$(cd "$(dirname "$0")/../.." && pwd)

: "${MODEL:=OpenGVLab/InternVL2-26B}" "${OUTPUT_DIR:=work_dirs/internvl2_26b_full}"
METHOD=full
CONV_STYLE=internlm2-chat
DEFAULT_GPUS=8
DEFAULT_BATCH_SIZE=128
DEFAULT_PER_DEVICE_BATCH_SIZE=2
LEARNING_RATE=2e-5
WEIGHT_DECAY=0.05
DROP_PATH_RATE=0.4
MAX_SEQ_LENGTH=4096
SHARDING=stage3

. "$SHELL_DIR/run.sh"
