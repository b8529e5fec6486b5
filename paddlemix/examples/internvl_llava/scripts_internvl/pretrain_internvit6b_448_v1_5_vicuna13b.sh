#!/bin/sh
# Stage 1 with InternViT-6B-448px-V1-5 and Vicuna-13B: the projector learns captions. Variables and arguments: see run.sh.
set -eu
SCRIPTS=$(cd "$(dirname "$0")" && pwd)

: "${MODEL:=lmsys/vicuna-13b-v1.5}" "${VISION_TOWER:=OpenGVLab/InternViT-6B-448px-V1-5}"
: "${OUTPUT_DIR:=work_dirs/pretrain_internvit6b_448_v1_5_vicuna13b}"
STAGE=1
SELECT_LAYER=-1
LEARNING_RATE=1e-3
DEFAULT_GPUS=8
DEFAULT_BATCH_SIZE=256
DEFAULT_PER_DEVICE_BATCH_SIZE=16
SHARDING=stage1

. "$SCRIPTS/run.sh"
