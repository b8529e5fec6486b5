#!/bin/sh
# InternVL-Chat-V1-5 from its parts: the projector learns. Variables and arguments: see ../../run.sh.
set -eu
SHELL_DIR=$(cd "$(dirname "$0")/../.." && pwd)

: "${VISION_PATH:=OpenGVLab/InternViT-6B-448px-V1-5}" "${LLM_PATH:=NousResearch/Nous-Hermes-2-Yi-34B}"
: "${MLP_PATH:=pretrained/hermes_2_yi_34b.pth}"
: "${OUTPUT_DIR:=work_dirs/internvl_chat_v1_5/internvl_chat_v1_5_hermes2_yi34b_dynamic_res_pretrain}"
METHOD=projector
CONV_STYLE=Hermes-2
DEFAULT_GPUS=256
DEFAULT_NODES=32
DEFAULT_BATCH_SIZE=2048
DEFAULT_PER_DEVICE_BATCH_SIZE=2
LEARNING_RATE=1e-4
WEIGHT_DECAY=0.05
DROP_PATH_RATE=0.0
MAX_SEQ_LENGTH=4096
SHARDING=stage3
set -- --max_dynamic_patch 12 --save_total_limit 3 --warmup_steps 100 --group_by_length False "$@"

. "$SHELL_DIR/run.sh"
