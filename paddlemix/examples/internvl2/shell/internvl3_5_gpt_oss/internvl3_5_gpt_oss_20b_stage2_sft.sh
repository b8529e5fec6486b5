#!/bin/sh
# InternVL3_5-GPT-OSS-20B-A4B, stage2, sft: all parts learn, from the result of stage 1.
# Variables and arguments: see ../run.sh and ../sft.sh. Attention holds its scores here (docs/finetune.md): see what --dry_run says.
set -eu
SHELL_DIR=$(cd "$(dirname "$0")/.." && pwd)

: "${MODEL:=work_dirs/internvl3_5_gpt_oss_20b_pretrain/internvl3_5_gpt_oss_20b_stage1_pretrain}" "${META:=pretrain_mixture.json}"
: "${OUTPUT_DIR:=work_dirs/internvl3_5_gpt_oss_20b_pretrain/internvl3_5_gpt_oss_20b_stage2_sft}"
CONV_STYLE=internvl3_5_gpt_oss
DROP_PATH_RATE=0.1
METHOD=all
LEARNING_RATE=8e-5
STEPS=8000

. "$SHELL_DIR/sft.sh"
