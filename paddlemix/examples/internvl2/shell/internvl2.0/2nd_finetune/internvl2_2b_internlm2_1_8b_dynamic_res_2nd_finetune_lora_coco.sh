#!/bin/sh
# InternVL2-2B: LoRA adapters of rank 128 in the language model learn, the rest is frozen. Variables and arguments: see ../../run.sh.
set -eu
SHELL_DIR=$(cd "$(dirname "$0")/../.." && pwd)

: "${MODEL:=OpenGVLab/InternVL2-2B}" "${OUTPUT_DIR:=work_dirs/internvl2_2b_lora_coco}"
METHOD=lora
CONV_STYLE=internlm2-chat
DEFAULT_GPUS=8
DEFAULT_BATCH_SIZE=512
DEFAULT_PER_DEVICE_BATCH_SIZE=4
DEFAULT_META=coco_caption.json
LEARNING_RATE=4e-5
WEIGHT_DECAY=0.01
DROP_PATH_RATE=0.0
MAX_SEQ_LENGTH=4096
SHARDING=stage1

set -- --use_llm_lora 128 "$@"

. "$SHELL_DIR/run.sh"
