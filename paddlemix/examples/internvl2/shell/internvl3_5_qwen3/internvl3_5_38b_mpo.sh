#!/bin/sh
# InternVL3_5-38B, preference training (MPO) from OpenGVLab/InternVL3_5-38B-Instruct. Variables and arguments: see ../run.sh and ../mpo.sh.
set -eu
SHELL_DIR=$(cd "$(dirname "$0")/.." && pwd)

: "${MODEL:=OpenGVLab/InternVL3_5-38B-Instruct}" "${META:=MMPR-v1.2/meta.json}" "${OUTPUT_DIR:=work_dirs/internvl3_5_38b_mpo}"
CONV_STYLE=internvl2_5
DEFAULT_BATCH_SIZE=256
LEARNING_RATE=2e-7
WEIGHT_DECAY=0.05
DROP_PATH_RATE=0.4
MAX_SEQ_LENGTH=16384
SHARDING=stage3

. "$SHELL_DIR/mpo.sh"
