# What the scripts of this folder have in common: fine-tuning for retrieval. They set DATASET, SIZE, EPOCHS and what learns, and
# source this file.
#
# From the environment (defaults in brackets), beside what examples/internvl2/shell/run.sh tells of DEVICE, GPUS, NODES,
# PER_DEVICE_BATCH_SIZE, BATCH_SIZE, PRECISION, PYTHON and PARTITION:
#   MODEL [OpenGVLab/InternVL-14B-224px]  model to start from
#   IMAGES, ANNOTATIONS                   pictures and their captions [the published ones below data/]
#   VIT_LAYER_DECAY_RATE, QLLAMA_LAYER_DECAY_RATE  learning rate of a block divided by that of the next [the script's]
#   OUTPUT_DIR                            where results go [the script's]
# Arguments of the script are handed on to the trainer, after those below, so that they replace them.
# --dry_run prints the command and starts nothing.

LAUNCH_DIR=$(cd "$SCRIPTS/../../internvl2/shell" && pwd)
. "$LAUNCH_DIR/launch.sh"

case $DATASET in
    flickr) images=data/flickr30k/Images annotations=data/flickr30k/flickr30k_train_karpathy.txt ;;
    flickrcn) images=data/flickr30k/Images annotations=data/flickr30k/flickr30k_cn_train.txt ;;
    coco) images=data/coco annotations=data/coco/annotations/coco_karpathy_train.json ;;
esac

if [ "$LEARNS" != all ]; then
    set -- --freeze_model True --freeze_vision_model True --freeze_qllama True --unfreeze_qllama_head True "$@"
fi
if [ "$LEARNS" = lora ]; then
    set -- --use_backbone_lora 16 --use_qllama_lora 16 "$@"
fi

set -- \
    --device "$DEVICE" \
    --model_name_or_path "${MODEL:-OpenGVLab/InternVL-14B-224px}" \
    --images "${IMAGES:-$images}" \
    --annotations "${ANNOTATIONS:-$annotations}" \
    --output_dir "$OUTPUT_DIR" \
    --force_image_size "$SIZE" \
    --drop_path_rate "$DROP_PATH" \
    --vit_layer_decay_rate "${VIT_LAYER_DECAY_RATE:-$LAYER_DECAY}" \
    --qllama_layer_decay_rate "${QLLAMA_LAYER_DECAY_RATE:-$LAYER_DECAY}" \
    --num_train_epochs "$EPOCHS" \
    --per_device_train_batch_size "$PER_DEVICE_BATCH_SIZE" \
    --gradient_accumulation_steps $((BATCH_SIZE / at_once)) \
    --save_strategy steps \
    --save_steps 100 \
    --save_total_limit 5 \
    --learning_rate 1e-6 \
    --weight_decay 0.05 \
    --warmup_steps 100 \
    --lr_scheduler_type cosine \
    --logging_steps 1 \
    --dataloader_num_workers 2 \
    --recompute True \
    --report_to visualdl \
    --sharding "$SHARDING" \
    "$@"

if $dry; then
    kept=$(printf '%s\n' "$@" | sed '/^--dry_run$/d' | tr '\n' ' ')
    echo "$GPUS processes of: $PYTHON $(dirname "$SCRIPTS")/finetune_retrieval.py $kept"
    exit 0
fi
launch "$(dirname "$SCRIPTS")/finetune_retrieval.py" "$@"
