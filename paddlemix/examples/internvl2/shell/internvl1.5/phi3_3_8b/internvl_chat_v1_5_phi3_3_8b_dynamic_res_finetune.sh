#!/bin/sh
# The result of the script for pretraining: everything learns. Variables and arguments: see ../../run.sh.
set -eu
SHELL_DIR=$(cd "$(dirname "$0")/../.." && pwd)

: "${MODEL:=work_dirs/internvl_chat_v1_5/internvl_chat_v1_5_phi3_3_8b_dynamic_res_pretrain}" "${OUTPUT_DIR:=work_dirs/internvl_chat_v1_5/internvl_chat_v1_5_phi3_3_8b_dynamic_res_finetune}"
METHOD=all
CONV_STYLE=phi3-chat
DEFAULT_GPUS=128
DEFAULT_NODES=16
DEFAULT_BATCH_SIZE=1024
DEFAULT_PER_DEVICE_BATCH_SIZE=4
LEARNING_RATE=4e-5
WEIGHT_DECAY=0.05
DROP_PATH_RATE=0.1
MAX_SEQ_LENGTH=8192
SHARDING=stage1
set -- --max_dynamic_patch 12 --save_total_limit 3 "$@"

. "$SHELL_DIR/run.sh"
