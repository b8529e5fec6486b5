#!/bin/sh
# Everything learns on COCO, at 364 pixels. Variables and arguments: see ../run.sh.
set -eu
SCRIPTS=$(cd "$(dirname "$0")/.." && pwd)

: "${OUTPUT_DIR:=work_dirs/internvl_stage2_finetune_coco_364_bs1024_ep5}"
DATASET=coco
SIZE=364
EPOCHS=5
LEARNS=all
DROP_PATH=0.3
LAYER_DECAY=0.9
DEFAULT_GPUS=32
DEFAULT_NODES=4
DEFAULT_BATCH_SIZE=1024
DEFAULT_PER_DEVICE_BATCH_SIZE=32
SHARDING=stage1

. "$SCRIPTS/run.sh"
