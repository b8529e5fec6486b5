#!/bin/sh
# InternVL2_5-26B, stage 1.5: projector and vision tower learn. Variables and arguments: see ../../run.sh and ../../stage.sh.
set -eu
SHELL_DIR=$(cd "$(dirname "$0")/../.." && pwd)

: "${MODEL:=work_dirs/internvl_chat_v2_5/internvl2_5_26b_internlm2_5_20b_dynamic_res_stage1}"
: "${META:=pretrain_mixture.json}" "${OUTPUT_DIR:=work_dirs/internvl_chat_v2_5/internvl2_5_26b_internlm2_5_20b_dynamic_res_stage1_5}"
METHOD=projector_and_vision
LEARNING_RATE=1e-5
WEIGHT_DECAY=0.05
DROP_PATH_RATE=0.4
WARMUP="--warmup_steps 100"
STEPS=100000
SHARDING=stage3

. "$SHELL_DIR/stage.sh"
