#!/bin/sh
# InternVL2-8B, preference training (MPO) from OpenGVLab/InternVL2-8B. Variables and arguments: see ../../run.sh and ../../mpo.sh.
set -eu
SHELL_DIR=$(cd "$(dirname "$0")/../.." && pwd)

: "${MODEL:=OpenGVLab/InternVL2-8B}" "${META:=MMPR/meta.json}" "${OUTPUT_DIR:=work_dirs/internvl2_8b_internlm2_7b_dynamic_res_mpo_full}"
CONV_STYLE=internlm2-chat
DEFAULT_BATCH_SIZE=256
LEARNING_RATE=5e-6
WEIGHT_DECAY=0.05
DROP_PATH_RATE=0.1
MAX_SEQ_LENGTH=6144
SHARDING=stage1
set -- --save_steps 100 "$@"

. "$SHELL_DIR/mpo.sh"
