#!/bin/sh
# InternVL3_5-GPT-OSS-20B-A4B, stage0, mlp: the projector learns, from a vision tower and a language model, whose MXFP4 becomes bfloat16.
# Variables and arguments: see ../run.sh and ../sft.sh. Attention holds its scores here (docs/finetune.md): see what --dry_run says.
set -eu
SHELL_DIR=$(cd "$(dirname "$0")/.." && pwd)

: "${VISION_PATH:=OpenGVLab/InternViT-300M-448px-V2_5}" "${LLM_PATH:=openai/gpt-oss-20b}"
: "${META:=pretrain_mixture.json}" "${OUTPUT_DIR:=work_dirs/internvl3_5_gpt_oss_20b_pretrain/internvl3_5_gpt_oss_20b_stage0_mlp}"
CONV_STYLE=internvl3_5_gpt_oss
DROP_PATH_RATE=0.1
METHOD=projector
LEARNING_RATE=1e-3
STEPS=5000
DEFAULT_BATCH_SIZE=256
MAX_SEQ_LENGTH=16384
WARMUP_RATIO=0.01

. "$SHELL_DIR/sft.sh"
