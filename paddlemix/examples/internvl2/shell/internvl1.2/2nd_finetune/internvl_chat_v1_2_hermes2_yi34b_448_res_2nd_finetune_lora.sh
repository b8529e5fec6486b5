#!/bin/sh
# InternVL-Chat-V1-2-Plus: LoRA adapters of rank 16 in the language model learn, the rest is frozen. Variables and arguments: see ../../run.sh.
set -eu
SHELL_DIR=$(cd "$(dirname "$0")/../.." && pwd)

: "${MODEL:=OpenGVLab/InternVL-Chat-V1-2-Plus}" "${OUTPUT_DIR:=work_dirs/internvl_chat_v1_2/2nd_finetune_lora}"
METHOD=lora
CONV_STYLE=Hermes-2
DEFAULT_GPUS=2
DEFAULT_BATCH_SIZE=16
DEFAULT_PER_DEVICE_BATCH_SIZE=4
DEFAULT_META=internvl_1_2_finetune_custom.json
LEARNING_RATE=1e-5
WEIGHT_DECAY=0.05
DROP_PATH_RATE=0.0
MAX_SEQ_LENGTH=2048
SHARDING=stage3
set -- --dynamic_image_size False --use_thumbnail False --ps_version v1 --save_total_limit 1 "$@"

. "$SHELL_DIR/run.sh"
