#!/bin/sh
# InternVL3_5-241B-A28B: all parts learn, from the pretrained model. Variables and arguments: see ../run.sh and ../sft.sh.
set -eu
SHELL_DIR=$(cd "$(dirname "$0")/.." && pwd)

: "${MODEL:=OpenGVLab/InternVL3_5-241B-A28B-Pretrained}" "${META:=pretrain_mixture.json}" "${OUTPUT_DIR:=work_dirs/internvl3_5_241b_sft}"
METHOD=all
CONV_STYLE=internvl2_5
LEARNING_RATE=2e-5
DROP_PATH_RATE=0.4
STEPS=8000

. "$SHELL_DIR/sft.sh"
