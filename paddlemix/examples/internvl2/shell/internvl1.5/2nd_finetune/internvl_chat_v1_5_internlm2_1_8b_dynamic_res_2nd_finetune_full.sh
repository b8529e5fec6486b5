#!/bin/sh
# Mini-InternVL-Chat-2B-V1-5: projector and language model learn, the tower is frozen. Variables and arguments: see ../../run.sh.
set -eu
SHELL_DIR=$(cd "$(dirname "$0")/../.." && pwd)

: "${MODEL:=OpenGVLab/Mini-InternVL-Chat-2B-V1-5}" "${OUTPUT_DIR:=work_dirs/internvl_chat_v1_5/internlm2_1_8b_2nd_finetune_full}"
METHOD=full
CONV_STYLE=internlm2-chat
DEFAULT_GPUS=8
DEFAULT_BATCH_SIZE=128
DEFAULT_PER_DEVICE_BATCH_SIZE=4
DEFAULT_META=internvl_1_2_finetune_custom.json
LEARNING_RATE=4e-5
WEIGHT_DECAY=0.01
DROP_PATH_RATE=0.1
MAX_SEQ_LENGTH=4096
SHARDING=stage1
set -- --max_dynamic_patch 12 --save_total_limit 1 "$@"

. "$SHELL_DIR/run.sh"
