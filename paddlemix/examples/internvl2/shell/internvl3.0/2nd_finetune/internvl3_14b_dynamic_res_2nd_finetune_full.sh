#!/bin/sh
# InternVL3-14B: projector and language model learn, the rest is frozen. Variables and arguments: see ../../run.sh.
set -eu
SHELL_DIR=$(cd "$(dirname "$0")/../.." && pwd)

: "${MODEL:=OpenGVLab/InternVL3-14B}" "${OUTPUT_DIR:=work_dirs/internvl3_14b_full}"
METHOD=full
CONV_STYLE=internvl2_5
DEFAULT_GPUS=8
DEFAULT_NODES=1
DEFAULT_BATCH_SIZE=128
DEFAULT_PER_DEVICE_BATCH_SIZE=4
DEFAULT_META=internvl_1_2_finetune_custom.json
LEARNING_RATE=2e-5
WEIGHT_DECAY=0.05
DROP_PATH_RATE=0.1
MAX_SEQ_LENGTH=16384
SHARDING=stage3
set -- --max_dynamic_patch 12 "$@"

. "$SHELL_DIR/run.sh"
