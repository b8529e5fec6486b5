#!/bin/sh
# LoRA of rank 16 and the head of QLLaMA learn on COCO, at 224 pixels. Variables and arguments: see ../run.sh.
set -eu
SCRIPTS=$(cd "$(dirname "$0")/.." && pwd)

: "${OUTPUT_DIR:=work_dirs/internvl_stage2_finetune_coco_224_bs1024_ep5_lora16_4gpu}"
DATASET=coco
SIZE=224
EPOCHS=5
LEARNS=lora
DROP_PATH=0.0
LAYER_DECAY=1.0
DEFAULT_GPUS=4
DEFAULT_NODES=1
DEFAULT_BATCH_SIZE=128
DEFAULT_PER_DEVICE_BATCH_SIZE=32
SHARDING=stage3

. "$SCRIPTS/run.sh"
