# What the scripts of preference training have in common; they set what run.sh needs, and then source this file. One pair a card,
# all parts learn. META is the meta file of MMPR (docs/mpo.md).

TRAINER=internvl_chat_mpo.py
METHOD=all
DEFAULT_GPUS=$DEFAULT_BATCH_SIZE
DEFAULT_NODES=$((DEFAULT_BATCH_SIZE / 8))
DEFAULT_PER_DEVICE_BATCH_SIZE=1
set -- --loss_type sigmoid,bco_pair --sigmoid_loss_weight 0.8 --bco_pair_loss_weight 0.2 --rpo_alpha 1 --beta 0.1 \
    --max_dynamic_patch 12 --group_by_length False "$@"

. "$SHELL_DIR/run.sh"
