#!/bin/sh
# InternVL3_5-GPT-OSS-20B-A4B, stage1, pretrain: all parts learn, from the result of stage 0.
# Variables and arguments: see ../run.sh and ../sft.sh. Attention holds its scores here (docs/finetune.md): see what --dry_run says.
set -eu
SHELL_DIR=$(cd "$(dirname "$0")/.." && pwd)

: "${MODEL:=work_dirs/internvl3_5_gpt_oss_20b_pretrain/internvl3_5_gpt_oss_20b_stage0_mlp}" "${META:=pretrain_mixture.json}"
: "${OUTPUT_DIR:=work_dirs/internvl3_5_gpt_oss_20b_pretrain/internvl3_5_gpt_oss_20b_stage1_pretrain}"
CONV_STYLE=internvl3_5_gpt_oss
DROP_PATH_RATE=0.1
METHOD=all
LEARNING_RATE=2e-5
STEPS=15000

. "$SHELL_DIR/sft.sh"
