#!/bin/sh
# InternVL2_5-38B: LoRA adapters of rank 16 in the language model learn, the rest is frozen. Variables and arguments: see ../../run.sh.
set -eu
SHELL_DIR=$(cd "$(dirname "$0")/../.." && pwd)

: "${MODEL:=OpenGVLab/InternVL2_5-38B}" "${OUTPUT_DIR:=work_dirs/internvl2_5_38b_lora}"
METHOD=lora
CONV_STYLE=internvl2_5
DEFAULT_GPUS=2
DEFAULT_BATCH_SIZE=16
DEFAULT_PER_DEVICE_BATCH_SIZE=2
DEFAULT_META=internvl_1_2_finetune_custom.json
LEARNING_RATE=2e-5
WEIGHT_DECAY=0.05
DROP_PATH_RATE=0.0
MAX_SEQ_LENGTH=8192
SHARDING=stage3

. "$SHELL_DIR/run.sh"
