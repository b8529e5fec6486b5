#!/bin/sh
# InternVL2_5-78B, preference training (MPO) from OpenGVLab/InternVL2_5-78B. Variables and arguments: see ../../run.sh and ../../mpo.sh.
set -eu
SHELL_DIR=$(cd "$(dirname "$0")/../.." && pwd)

: "${MODEL:=OpenGVLab/InternVL2_5-78B}" "${META:=MMPR-v1.1/meta.json}" "${OUTPUT_DIR:=work_dirs/internvl2_5_78b_qwen2_5_72b_dynamic_res_mpo}"
CONV_STYLE=internvl2_5
DEFAULT_BATCH_SIZE=512
LEARNING_RATE=1e-6
WEIGHT_DECAY=0.05
DROP_PATH_RATE=0.4
MAX_SEQ_LENGTH=8192
SHARDING=stage3

. "$SHELL_DIR/mpo.sh"
