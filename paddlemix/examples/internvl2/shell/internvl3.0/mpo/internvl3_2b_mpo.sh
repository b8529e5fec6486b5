#!/bin/sh
# InternVL3-2B, preference training (MPO) from OpenGVLab/InternVL3-2B-Instruct. Variables and arguments: see ../../run.sh and ../../mpo.sh.
set -eu
SHELL_DIR=$(cd "$(dirname "$0")/../.." && pwd)

: "${MODEL:=OpenGVLab/InternVL3-2B-Instruct}" "${META:=MMPR-v1.2/meta.json}" "${OUTPUT_DIR:=work_dirs/internvl3_2b_mpo}"
CONV_STYLE=internvl2_5
DEFAULT_BATCH_SIZE=256
LEARNING_RATE=2e-7
WEIGHT_DECAY=0.05
DROP_PATH_RATE=0.1
MAX_SEQ_LENGTH=12288
SHARDING=stage1

. "$SHELL_DIR/mpo.sh"
