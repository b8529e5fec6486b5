#!/bin/sh
# InternVL2_5-38B, stage 1: the projector learns, between a vision tower and a language model. Variables and arguments: see ../../run.sh and ../../stage.sh.
set -eu
SHELL_DIR=$(cd "$(dirname "$0")/../.." && pwd)

: "${VISION_PATH:=OpenGVLab/InternViT-6B-448px-V2_5}" "${LLM_PATH:=Qwen/Qwen2.5-32B-Instruct}"
: "${META:=pretrain_mixture.json}" "${OUTPUT_DIR:=work_dirs/internvl_chat_v2_5/internvl2_5_38b_qwen2_5_32b_dynamic_res_stage1}"
METHOD=projector
LEARNING_RATE=2e-4
WEIGHT_DECAY=0.05
DROP_PATH_RATE=0.0
WARMUP="--warmup_steps 100"
STEPS=100000
SHARDING=stage3

. "$SHELL_DIR/stage.sh"
