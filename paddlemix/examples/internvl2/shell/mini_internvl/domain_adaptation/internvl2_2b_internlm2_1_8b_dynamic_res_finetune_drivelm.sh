#!/bin/sh
# InternVL2-2B for a domain, drivelm: everything learns, on packed rows. Variables and arguments: see ../../run.sh.
set -eu
SHELL_DIR=$(cd "$(dirname "$0")/../.." && pwd)

: "${MODEL:=OpenGVLab/InternVL2-2B}" "${OUTPUT_DIR:=work_dirs/domain_adaptation/internvl2_2b_internlm2_1_8b_dynamic_res_finetune_drivelm}"
: "${META:=InternVL-Domain-Adaptation-Data/train_meta/internvl_1_2_finetune_drivelm.json}"
METHOD=all
CONV_STYLE=internlm2-chat
DEFAULT_GPUS=8
DEFAULT_BATCH_SIZE=8
DEFAULT_PER_DEVICE_BATCH_SIZE=1
LEARNING_RATE=1e-5
WEIGHT_DECAY=0.01
DROP_PATH_RATE=0.1
MAX_SEQ_LENGTH=8192
SHARDING=stage1
set -- \
    --max_dynamic_patch 12 --num_train_epochs 2 --max_steps 15100 --group_by_length False --use_packed_ds True \
    --num_images_expected 48 --max_packed_tokens 16384 --max_buffer_size 20 --loss_reduction square \
    --loss_reduction_all_gather True --save_steps 700 --save_total_limit 3 "$@"

. "$SHELL_DIR/run.sh"
