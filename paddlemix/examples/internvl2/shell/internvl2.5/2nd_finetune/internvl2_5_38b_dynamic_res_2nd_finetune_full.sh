#!/bin/sh
# InternVL2_5-38B: projector and language model learn, the rest is frozen. Variables and arguments: see ../../run.sh.
set -eu
SHELL_DIR=$(cd "$(dirname "$0")/../.." && pwd)

: "${MODEL:=OpenGVLab/InternVL2_5-38B}" "${OUTPUT_DIR:=work_dirs/internvl2_5_38b_full}"
METHOD=full
CONV_STYLE=internvl2_5
DEFAULT_GPUS=16
DEFAULT_NODES=2
DEFAULT_BATCH_SIZE=128
DEFAULT_PER_DEVICE_BATCH_SIZE=2
DEFAULT_META=internvl_1_2_finetune_custom.json
LEARNING_RATE=2e-5
WEIGHT_DECAY=0.05
DROP_PATH_RATE=0.4
MAX_SEQ_LENGTH=8192
SHARDING=stage3

. "$SHELL_DIR/run.sh"
