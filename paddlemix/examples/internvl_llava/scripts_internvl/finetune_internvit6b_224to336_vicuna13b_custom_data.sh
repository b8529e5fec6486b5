#!/bin/sh
# Stage 2 with InternViT-6B-224px and Vicuna-13B on the data sets of a meta file. Variables and arguments: see run.sh.
set -eu
SCRIPTS=$(cd "$(dirname "$0")" && pwd)

: "${MODEL:=lmsys/vicuna-13b-v1.5}" "${VISION_TOWER:=OpenGVLab/InternViT-6B-224px}"
: "${PROJECTOR:=work_dirs/pretrain_internvit6b_224to336_vicuna13b/mm_projector.bin}"
: "${META:=scripts_internvl/meta/custom_data.json}"
: "${OUTPUT_DIR:=work_dirs/finetune_internvit6b_224to336_vicuna13b_custom_data}"
STAGE=2
SELECT_LAYER=-4
LEARNING_RATE=2e-5
GROUP=False
DEFAULT_GPUS=128
DEFAULT_NODES=16
DEFAULT_BATCH_SIZE=512
DEFAULT_PER_DEVICE_BATCH_SIZE=2
SHARDING=stage1

. "$SCRIPTS/run.sh"
