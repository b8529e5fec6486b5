# What the scripts of this folder have in common; they set STAGE, SELECT_LAYER, LEARNING_RATE and sizes, and source this file.
#
# From the environment (defaults in brackets), beside what examples/internvl2/shell/run.sh tells of DEVICE, GPUS, NODES,
# PER_DEVICE_BATCH_SIZE, BATCH_SIZE, PRECISION, PYTHON and PARTITION (GPUS counts the devices of all machines, and NNODES,
# NODE_RANK and PORT work as in the original):
#   MODEL, VISION_TOWER      language model and tower [the script's]
#   PROJECTOR                stage 2: mm_projector.bin of stage 1 [the script's]
#   DATA, IMAGES             records and their pictures [the published ones below playground/]
#   META                     a meta file of several data sets, instead of DATA and IMAGES
#   OUTPUT_DIR               where results go [the script's]
# Arguments of the script are handed on to the trainer, after those below, so that they replace them.
# --dry_run prints the plan for all processes and starts none.

LAUNCH_DIR=$(cd "$SCRIPTS/../../internvl2/shell" && pwd)
. "$LAUNCH_DIR/launch.sh"

if [ -n "${META:-}" ]; then
    # The published script is started from the folder above, where this file is.
    [ -f "$META" ] || [ ! -f "$SCRIPTS/../$META" ] || META=$SCRIPTS/../$META
    set -- --meta_path "$META" "$@"
elif [ "$STAGE" -eq 1 ]; then
    set -- --data_path "${DATA:-playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}" \
        --image_folder "${IMAGES:-playground/data/LLaVA-Pretrain/images}" "$@"
else
    set -- --data_path "${DATA:-playground/llava_v1_5_mix665k.json}" --image_folder "${IMAGES:-playground/data}" "$@"
fi

if [ "$STAGE" -eq 1 ]; then
    set -- --version plain --tune_mm_mlp_adapter True --image_aspect_ratio square "$@"
else
    set -- --version v1 --pretrain_mm_mlp_adapter "$PROJECTOR" --image_aspect_ratio pad \
        --group_by_modality_length "${GROUP:-True}" "$@"
fi

set -- \
    --device "$DEVICE" \
    --model_name_or_path "$MODEL" \
    --vision_tower "$VISION_TOWER" \
    --mm_projector_type mlp2x_gelu \
    --mm_vision_select_layer "$SELECT_LAYER" \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --output_dir "$OUTPUT_DIR" \
    --num_train_epochs 1 \
    --per_device_train_batch_size "$PER_DEVICE_BATCH_SIZE" \
    --gradient_accumulation_steps $((BATCH_SIZE / at_once)) \
    --evaluation_strategy no \
    --save_strategy steps \
    --save_steps "${SAVE_STEPS:-1000}" \
    --save_total_limit 3 \
    --learning_rate "$LEARNING_RATE" \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type cosine \
    --logging_steps 1 \
    --tf32 True \
    --model_max_length 2048 \
    --gradient_checkpointing True \
    --dataloader_num_workers 4 \
    --lazy_preprocess True \
    --report_to visualdl \
    --sharding "$SHARDING" \
    "$@"

launch "$(dirname "$SCRIPTS")/train.py" "$@"
