# What the scripts of pretraining have in common (stage 1, 1.5 and 2 of InternVL2.5); they set what run.sh needs, WARMUP and STEPS,
# and then source this file. A row of 16,384 tokens and at most 48 tiles on each of 512 cards is an update.

TRAINER=internvl_chat_pretrain.py
DEFAULT_GPUS=512
DEFAULT_NODES=64
DEFAULT_BATCH_SIZE=512
DEFAULT_PER_DEVICE_BATCH_SIZE=1
CONV_STYLE=internvl2_5
MAX_SEQ_LENGTH=16384
set -- --max_steps "$STEPS" $WARMUP --group_by_length False --save_steps 100 --save_total_limit 3 --max_dynamic_patch 12 \
    --use_packed_ds True --num_images_expected 48 --max_packed_tokens 16384 --max_buffer_size 20 --log_freq 1000 \
    --strict_mode False --replacement False --allow_overflow False --remove_unused_columns False \
    --loss_reduction square --loss_reduction_all_gather True "$@"

. "$SHELL_DIR/run.sh"
