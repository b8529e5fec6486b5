# What the scripts of InternVL3.5's supervised stages have in common; they set what run.sh needs, STEPS and, where they are others,
# DEFAULT_BATCH_SIZE, MAX_SEQ_LENGTH and WARMUP_RATIO, and then source this file. A row of 32,768 tokens and at most 96 tiles on
# each card is an update.

TRAINER=internvl_chat_pretrain.py
: "${DEFAULT_BATCH_SIZE:=512}" "${MAX_SEQ_LENGTH:=32768}" "${WARMUP_RATIO:=0.03}"
DEFAULT_GPUS=$DEFAULT_BATCH_SIZE
DEFAULT_NODES=$((DEFAULT_BATCH_SIZE / 8))
DEFAULT_PER_DEVICE_BATCH_SIZE=1
WEIGHT_DECAY=0.05
SHARDING=stage3
set -- --max_steps "$STEPS" --warmup_ratio "$WARMUP_RATIO" --group_by_length False --save_total_limit 3 --max_dynamic_patch 12 \
    --min_num_frame 8 --max_num_frame 32 --seed 42 \
    --use_packed_ds True --num_images_expected 96 --max_packed_tokens 32768 --max_buffer_size 20 \
    --strict_mode False --replacement True --allow_overflow False --remove_unused_columns False \
    --loss_reduction square --loss_reduction_all_gather True "$@"

. "$SHELL_DIR/run.sh"
