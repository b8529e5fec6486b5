#!/bin/sh
# InternVL2_5-8B, stage 2: all parts learn, from the result of stage 1.5. Variables and arguments: see ../../run.sh and ../../stage.sh.
set -eu
SHELL_DIR=$(cd "$(dirname "$0")/../.." && pwd)

: "${MODEL:=work_dirs/internvl_chat_v2_5/internvl2_5_8b_internlm2_5_7b_dynamic_res_stage1_5}"
: "${META:=pretrain_mixture.json}" "${OUTPUT_DIR:=work_dirs/internvl_chat_v2_5/internvl2_5_8b_internlm2_5_7b_dynamic_res_stage2}"
METHOD=all
LEARNING_RATE=4e-5
WEIGHT_DECAY=0.05
DROP_PATH_RATE=0.1
WARMUP="--warmup_ratio 0.03"
STEPS=5500
SHARDING=stage1

. "$SHELL_DIR/stage.sh"
