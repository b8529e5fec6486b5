#!/bin/sh
# InternVL2_5-4B, stage 1: the projector learns, between a vision tower and a language model. Variables and arguments: see ../../run.sh and ../../stage.sh.
set -eu
SHELL_DIR=$(cd "$(dirname "$0")/../.." && pwd)

: "${VISION_PATH:=OpenGVLab/InternViT-300M-448px}" "${LLM_PATH:=Qwen/Qwen2.5-3B-Instruct}"
: "${META:=pretrain_mixture.json}" "${OUTPUT_DIR:=work_dirs/internvl_chat_v2_5/internvl2_5_4b_qwen2_5_3b_dynamic_res_stage1}"
METHOD=projector
LEARNING_RATE=2e-4
WEIGHT_DECAY=0.01
DROP_PATH_RATE=0.0
WARMUP="--warmup_steps 100"
STEPS=100000
SHARDING=stage1

. "$SHELL_DIR/stage.sh"
