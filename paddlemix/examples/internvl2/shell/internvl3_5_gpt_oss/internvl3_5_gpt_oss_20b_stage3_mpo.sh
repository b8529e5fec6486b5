#!/bin/sh
# InternVL3_5-GPT-OSS-20B-A4B, preference training (MPO) from work_dirs/internvl3_5_gpt_oss_20b_pretrain/internvl3_5_gpt_oss_20b_stage2_sft. Variables and arguments: see ../run.sh and ../mpo.sh.
set -eu
SHELL_DIR=$(cd "$(dirname "$0")/.." && pwd)

: "${MODEL:=work_dirs/internvl3_5_gpt_oss_20b_pretrain/internvl3_5_gpt_oss_20b_stage2_sft}" "${META:=MMPR-v1.2/meta.json}" "${OUTPUT_DIR:=work_dirs/internvl3_5_gpt_oss_20b_stage3_mpo}"
CONV_STYLE=internvl3_5_gpt_oss
DEFAULT_BATCH_SIZE=256
LEARNING_RATE=2e-7
WEIGHT_DECAY=0.05
DROP_PATH_RATE=0.1
MAX_SEQ_LENGTH=16384
SHARDING=stage3

. "$SHELL_DIR/mpo.sh"
