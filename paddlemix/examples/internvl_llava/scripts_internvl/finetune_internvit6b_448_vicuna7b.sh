#!/bin/sh
# Stage 2 with InternViT-6B-448px and Vicuna-7B: projector and language model learn conversations. Variables and arguments: see run.sh.
set -eu
SCRIPTS=$(cd "$(dirname "$0")" && pwd)

: "${MODEL:=lmsys/vicuna-7b-v1.5}" "${VISION_TOWER:=OpenGVLab/InternViT-6B-448px}"
: "${PROJECTOR:=work_dirs/pretrain_internvit6b_448_vicuna7b/mm_projector.bin}"
: "${OUTPUT_DIR:=work_dirs/finetune_internvit6b_448_vicuna7b}"
STAGE=2
SELECT_LAYER=-4
LEARNING_RATE=2e-5
SAVE_STEPS=1000
DEFAULT_GPUS=8
DEFAULT_BATCH_SIZE=128
DEFAULT_PER_DEVICE_BATCH_SIZE=16
SHARDING=stage3

. "$SCRIPTS/run.sh"
