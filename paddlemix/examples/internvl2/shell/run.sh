# What the scripts of this folder have in common; they set MODEL, CONV_STYLE and hyper-parameters, and then source this file.
#
# From the environment (defaults in brackets):
#   DEVICE [gpu]             gpu, npu, cpu, or another Paddle device; npu takes the settings of tools/npu/env.sh that are not set
#   GPUS                     processes on all nodes together, one a device [the script's; 1 on cpu]
#   NODES                    machines [1, or the script's if GPUS is not set]; each runs the script with MASTER=host:port
#                            of one of them, and may set NODE_RANK
#   PER_DEVICE_BATCH_SIZE    samples that a device computes at once [the script's]
#   BATCH_SIZE               samples of an update, over all devices [the script's]
#   TENSOR_PARALLEL          devices that divide every layer and have the same samples [the script's, 1 for most]
#   MAX_RESTARTS [0]         how often a run that fails is started again from its last checkpoint
#   MODEL, META, OUTPUT_DIR  checkpoint, meta file of the data, and where results go [the script's]
#   VISION_PATH, LLM_PATH, MLP_PATH  parts to start from, in scripts that start from parts, unless MODEL is set
#   PARTITION                a partition of Slurm: the script starts itself there, on GPUS / GPUS_PER_NODE [8] machines, with
#                            QUOTA_TYPE, CPUS_PER_TASK [10] a device, and SRUN_ARGS
#   NNODES, MASTER_ADDR, PORT  other words for NODES and MASTER
#   PRECISION [bf16]         bf16, fp16 (V100) or fp32 [fp32 on cpu, where bf16 is of products alone]
#   PYTHON [python]          the interpreter
# Arguments of the script are handed on to the trainer, after those below, so that they replace them, such as --sharding stage3.
# --dry_run prints the plan for all processes and starts none.

: "${META:=$SHELL_DIR/data/${DEFAULT_META:-internvl_1_2_finetune.json}}"
LAUNCH_DIR=$SHELL_DIR
. "$SHELL_DIR/launch.sh"

case $METHOD in
    full) set -- --freeze_llm False --freeze_mlp False --freeze_backbone True "$@" ;;
    lora) set -- --freeze_llm True --freeze_mlp True --freeze_backbone True --use_llm_lora 16 "$@" ;;
    all) set -- --freeze_llm False --freeze_mlp False --freeze_backbone False "$@" ;;
    projector) set -- --freeze_llm True --freeze_mlp False --freeze_backbone True "$@" ;;
    projector_and_vision) set -- --freeze_llm True --freeze_mlp False --freeze_backbone False "$@" ;;
esac

if [ -n "${MODEL:-}" ]; then
    set -- --model_name_or_path "$MODEL" "$@"
else
    set -- --vision_path "$VISION_PATH" --llm_path "$LLM_PATH" ${MLP_PATH:+--mlp_path "$MLP_PATH"} "$@"
fi

set -- \
    --do_train True \
    --device "$DEVICE" \
    --conv_style "$CONV_STYLE" \
    --meta_path "$META" \
    --output_dir "$OUTPUT_DIR" \
    --force_image_size 448 \
    --max_dynamic_patch 6 \
    --down_sample_ratio 0.5 \
    --drop_path_rate "$DROP_PATH_RATE" \
    --vision_select_layer -1 \
    --dataloader_num_workers 4 \
    --num_train_epochs 1 \
    --per_device_train_batch_size "$PER_DEVICE_BATCH_SIZE" \
    --gradient_accumulation_steps $((BATCH_SIZE / at_once)) \
    --recompute True \
    --max_grad_norm 1.0 \
    --evaluation_strategy no \
    --save_strategy steps \
    --save_steps 200 \
    --save_total_limit 2 \
    --learning_rate "$LEARNING_RATE" \
    --weight_decay "$WEIGHT_DECAY" \
    --warmup_ratio 0.03 \
    --optim adamw \
    --lr_scheduler_type cosine \
    --logging_steps 1 \
    --max_seq_length "$MAX_SEQ_LENGTH" \
    --group_by_length True \
    --dynamic_image_size True \
    --use_thumbnail True \
    --ps_version v2 \
    --report_to visualdl \
    --sharding "$SHARDING" \
    --tensor_parallel_degree "$TENSOR_PARALLEL" \
    "$@"

launch "$(dirname "$SHELL_DIR")/${TRAINER:-internvl_chat_finetune.py}" "$@"
