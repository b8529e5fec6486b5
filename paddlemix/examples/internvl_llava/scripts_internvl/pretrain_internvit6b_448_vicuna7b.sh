#!/bin/sh
# Stage 1 with InternViT-6B-448px and Vicuna-7B: the projector learns captions. Variables and arguments: see run.sh.
set -eu
SCRIPTS=$(cd "$(dirname "$0")" && pwd)

: "${MODEL:=lmsys/vicuna-7b-v1.5}" "${VISION_TOWER:=OpenGVLab/InternViT-6B-448px}"
: "${OUTPUT_DIR:=work_dirs/pretrain_internvit6b_448_vicuna7b}"
STAGE=1
SELECT_LAYER=-4
LEARNING_RATE=1e-3
DEFAULT_GPUS=8
DEFAULT_BATCH_SIZE=256
DEFAULT_PER_DEVICE_BATCH_SIZE=32
SHARDING=stage2

. "$SCRIPTS/run.sh"
