#!/bin/sh
# Stage 2 with InternViT-6B-448px-V1-5 and Vicuna-13B: projector and language model learn conversations. Variables and arguments: see run.sh.
set -eu
SCRIPTS=$(cd "$(dirname "$0")" && pwd)

: "${MODEL:=lmsys/vicuna-13b-v1.5}" "${VISION_TOWER:=OpenGVLab/InternViT-6B-448px-V1-5}"
: "${PROJECTOR:=work_dirs/pretrain_internvit6b_448_v1_5_vicuna13b/mm_projector.bin}"
: "${OUTPUT_DIR:=work_dirs/finetune_internvit6b_448_v1_5_vicuna13b}"
STAGE=2
SELECT_LAYER=-1
LEARNING_RATE=2e-5
SAVE_STEPS=100
DEFAULT_GPUS=8
DEFAULT_BATCH_SIZE=128
DEFAULT_PER_DEVICE_BATCH_SIZE=16
SHARDING=stage3

. "$SCRIPTS/run.sh"
