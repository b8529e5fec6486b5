#!/bin/sh
# InternVL-Chat-V1-5 from its parts: projector and vision tower learn. Variables and arguments: see ../../run.sh.
set -eu
SHELL_DIR=$(cd "$(dirname "$0")/../.." && pwd)

: "${VISION_PATH:=OpenGVLab/InternViT-300M-448px}" "${LLM_PATH:=internlm/internlm2-chat-1_8b}"
: "${OUTPUT_DIR:=work_dirs/internvl_chat_v1_5/internvl_chat_v1_5_internlm2_1_8b_dynamic_res_pretrain}"
METHOD=projector_and_vision
CONV_STYLE=internlm2-chat
DEFAULT_GPUS=128
DEFAULT_NODES=16
DEFAULT_BATCH_SIZE=2048
DEFAULT_PER_DEVICE_BATCH_SIZE=8
LEARNING_RATE=2e-5
WEIGHT_DECAY=0.01
DROP_PATH_RATE=0.1
MAX_SEQ_LENGTH=4096
SHARDING=stage1
set -- --max_dynamic_patch 12 --save_total_limit 3 --warmup_steps 100 --group_by_length False "$@"

. "$SHELL_DIR/run.sh"
