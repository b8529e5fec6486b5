#!/bin/sh
# Mini-Monkey from InternVL2-2B: LoRA adapters of rank 16 learn, on tiles of two scales. Variables and arguments: see run.sh.
# The published script starts InternVL2's own trainer, without the second scale: surely an oversight.
set -eu
SHELL_DIR=$(cd "$(dirname "$0")/../../internvl2/shell" && pwd)

: "${MODEL:=OpenGVLab/InternVL2-2B}" "${OUTPUT_DIR:=work_dirs/minimonkey_lora}"
METHOD=lora
CONV_STYLE=internlm2-chat
DEFAULT_GPUS=8
DEFAULT_BATCH_SIZE=64
DEFAULT_PER_DEVICE_BATCH_SIZE=4
LEARNING_RATE=4e-9
WEIGHT_DECAY=0.01
DROP_PATH_RATE=0.0
MAX_SEQ_LENGTH=4096
SHARDING=stage1
set -- --multi_scale training "$@"

. "$SHELL_DIR/run.sh"
