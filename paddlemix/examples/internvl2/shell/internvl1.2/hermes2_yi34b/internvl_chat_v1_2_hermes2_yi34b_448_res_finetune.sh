#!/bin/sh
# InternVL-Chat-V1-2 from its parts: everything learns. Variables and arguments: see ../../run.sh.
set -eu
SHELL_DIR=$(cd "$(dirname "$0")/../.." && pwd)

: "${VISION_PATH:=OpenGVLab/InternViT-6B-448px-V1-2}" "${LLM_PATH:=NousResearch/Nous-Hermes-2-Yi-34B}"
: "${MLP_PATH:=pretrained/hermes_2_yi_34b.pth}"
: "${OUTPUT_DIR:=work_dirs/internvl_chat_v1_2/internvl_chat_v1_2_hermes2_yi34b_448_res_finetune}"
METHOD=all
CONV_STYLE=Hermes-2
DEFAULT_GPUS=64
DEFAULT_NODES=8
DEFAULT_BATCH_SIZE=512
DEFAULT_PER_DEVICE_BATCH_SIZE=8
LEARNING_RATE=1e-5
WEIGHT_DECAY=0.05
DROP_PATH_RATE=0.4
MAX_SEQ_LENGTH=2048
SHARDING=stage3
set -- --dynamic_image_size False --use_thumbnail False --ps_version v1 --save_total_limit 3 "$@"

. "$SHELL_DIR/run.sh"
