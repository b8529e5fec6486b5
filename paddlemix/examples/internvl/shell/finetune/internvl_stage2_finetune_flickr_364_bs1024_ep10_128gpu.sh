#!/bin/sh
# Everything learns on Flickr30K, at 364 pixels, on 128 devices. Variables and arguments: see ../run.sh.
set -eu
SCRIPTS=$(cd "$(dirname "$0")/.." && pwd)

: "${OUTPUT_DIR:=work_dirs/internvl_stage2_finetune_flickr_364_bs1024_ep10_128gpu}"
DATASET=flickr
SIZE=364
EPOCHS=10
LEARNS=all
DROP_PATH=0.3
LAYER_DECAY=0.9
DEFAULT_GPUS=128
DEFAULT_NODES=16
DEFAULT_BATCH_SIZE=1024
DEFAULT_PER_DEVICE_BATCH_SIZE=8
SHARDING=stage1

. "$SCRIPTS/run.sh"
