# What the scripts of this folder have in common; they set MODEL, CONV_STYLE and hyper-parameters, and then source this file.
#
# From the environment (defaults in brackets):
#   DEVICE [gpu]             gpu, npu, cpu, or another Paddle device; npu takes the settings of tools/npu/env.sh that are not set
#   GPUS                     processes on all nodes together, one a device [the script's; 1 on cpu]
#   NODES                    machines [1, or the script's if GPUS is not set]; each runs the script with MASTER=host:port
#                            of one of them, and may set NODE_RANK
#   PER_DEVICE_BATCH_SIZE    samples that a device computes at once [the script's]
#   BATCH_SIZE               samples of an update, over all devices [the script's]
#   MODEL, META, OUTPUT_DIR  checkpoint, meta file of the data, and where results go [the script's]
#   PRECISION [bf16]         bf16, fp16 (V100) or fp32 [fp32 on cpu, which computes in nothing else]
#   PYTHON [python]          the interpreter
# Arguments of the script are handed on to the trainer, after those below, so that they replace them, such as --sharding stage3.
# --dry_run prints the plan for all processes and starts none.

: "${DEVICE:=gpu}" "${PYTHON:=python}"
: "${META:=$SHELL_DIR/data/${DEFAULT_META:-internvl_1_2_finetune.json}}"
[ "$DEVICE" = cpu ] && : "${GPUS:=1}" "${PRECISION:=fp32}"
: "${PRECISION:=bf16}"
[ -n "${GPUS:-}" ] || : "${NODES:=${DEFAULT_NODES:-1}}"
: "${NODES:=1}" "${GPUS:=$DEFAULT_GPUS}" "${BATCH_SIZE:=$DEFAULT_BATCH_SIZE}" "${PER_DEVICE_BATCH_SIZE:=$DEFAULT_PER_DEVICE_BATCH_SIZE}"

fail() {
    echo "error: $1" >&2
    exit 2
}

# Ends the script with a command. Settings of NPU have to be there before Python is, and scripts of Ascend that belong to them
# need bash, and no complaint about variables that are not set.
settings=$SHELL_DIR/../../../../tools/npu/env.sh
start() {
    if [ "$DEVICE" = npu ] && [ -f "$settings" ]; then
        exec bash -c 'settings() { . "$0"; }; settings; exec "$@"' "$settings" "$@"
    fi
    exec "$@"
}

for number in "$GPUS" "$NODES" "$BATCH_SIZE" "$PER_DEVICE_BATCH_SIZE"; do
    case $number in
        0* | *[!0-9]*) fail "GPUS, NODES, BATCH_SIZE and PER_DEVICE_BATCH_SIZE must be positive numbers, not '$number'" ;;
    esac
done
[ $((GPUS % NODES)) -eq 0 ] || fail "GPUS=$GPUS processes cannot be divided over NODES=$NODES machines: GPUS counts all of them"
per_node=$((GPUS / NODES))

at_once=$((PER_DEVICE_BATCH_SIZE * GPUS))
[ $((BATCH_SIZE % at_once)) -eq 0 ] || fail "BATCH_SIZE=$BATCH_SIZE is not a multiple of PER_DEVICE_BATCH_SIZE=$PER_DEVICE_BATCH_SIZE \
times GPUS=$GPUS ($at_once): change one of them"

case $PRECISION in
    bf16) set -- --bf16 True --fp16 False --fp16_opt_level O2 --amp_master_grad True "$@" ;;
    fp16) set -- --bf16 False --fp16 True --fp16_opt_level O2 --amp_master_grad True "$@" ;;
    fp32) set -- --bf16 False --fp16 False "$@" ;;
    *) fail "PRECISION is '$PRECISION': use bf16, fp16 or fp32" ;;
esac

case $METHOD in
    full) set -- --freeze_llm False --freeze_mlp False --freeze_backbone True "$@" ;;
    lora) set -- --freeze_llm True --freeze_mlp True --freeze_backbone True --use_llm_lora 16 "$@" ;;
esac

set -- \
    --do_train True \
    --device "$DEVICE" \
    --model_name_or_path "$MODEL" \
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
    "$@"

trainer=$(dirname "$SHELL_DIR")/internvl_chat_finetune.py
for argument in "$@"; do
    if [ "$argument" = --dry_run ]; then
        start "$PYTHON" "$trainer" --processes "$GPUS" "$@"
    fi
done

mkdir -p "$OUTPUT_DIR"
if [ "$GPUS" -eq 1 ]; then
    start "$PYTHON" "$trainer" "$@"
fi

# Each process writes its log to a file of its own; the first one's also goes to the terminal.
set -- --run_mode collective --log_dir "$OUTPUT_DIR/launch_logs" "$trainer" "$@"
if [ "$NODES" -gt 1 ]; then
    [ -n "${MASTER:-}" ] || fail "NODES=$NODES needs MASTER=host:port, the same on every machine"
    set -- --nnodes "$NODES" --master "$MASTER" --rank "${NODE_RANK:--1}" "$@"
fi
if [ "$DEVICE" = cpu ]; then
    set -- --nproc_per_node "$per_node" "$@"
else
    # Where some devices are hidden, the launcher knows the others by their own numbers.
    case $DEVICE in
        gpu) visible=${CUDA_VISIBLE_DEVICES:-} ;;
        npu) visible=${NPU_VISIBLE_DEVICES:-} ;;
        *) visible= ;;
    esac
    set -- --devices "$(echo "${visible:-$(seq -s , 0 $((per_node - 1)))}" | cut -d , -f "1-$per_node")" "$@"
fi
start "$PYTHON" -m paddle.distributed.launch "$@"
