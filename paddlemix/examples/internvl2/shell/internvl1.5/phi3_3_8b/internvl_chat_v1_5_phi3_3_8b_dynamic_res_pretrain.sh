#!/bin/sh
# InternVL-Chat-V1-5 from its parts: the projector learns. Variables and arguments: see ../../run.sh.
set -eu
SHELL_DIR=$(cd "$(dirname "$0")/../.." && pwd)

: "${VISION_PATH:=OpenGVLab/InternViT-300M-448px}" "${LLM_PATH:=microsoft/Phi-3-mini-128k-instruct}"
: "${OUTPUT_DIR:=work_dirs/internvl_chat_v1_5/internvl_chat_v1_5_phi3_3_8b_dynamic_res_pretrain}"
METHOD=projector
CONV_STYLE=phi3-chat
DEFAULT_GPUS=128
DEFAULT_NODES=16
DEFAULT_BATCH_SIZE=2048
DEFAULT_PER_DEVICE_BATCH_SIZE=8
LEARNING_RATE=2e-4
WEIGHT_DECAY=0.05
DROP_PATH_RATE=0.0
MAX_SEQ_LENGTH=4096
SHARDING=stage1
set -- --max_dynamic_patch 12 --save_total_limit 3 --warmup_steps 100 --group_by_length False "$@"

. "$SHELL_DIR/run.sh"
