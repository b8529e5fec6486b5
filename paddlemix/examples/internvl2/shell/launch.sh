# How the scripts of all families start the trainer; they set their defaults (DEFAULT_GPUS, DEFAULT_BATCH_SIZE,
# DEFAULT_PER_DEVICE_BATCH_SIZE, DEFAULT_NODES) and LAUNCH_DIR, this folder, source this file, and end with
#   launch TRAINER ARGUMENTS
# What they take from the environment is told in run.sh. With PARTITION, a script starts itself on the machines of a Slurm job.

: "${DEVICE:=gpu}" "${PYTHON:=python}"
[ "$DEVICE" = cpu ] && : "${GPUS:=1}" "${PRECISION:=fp32}"
: "${PRECISION:=bf16}"
if [ -n "${NNODES:-}" ]; then : "${NODES:=$NNODES}"; fi
if [ -n "${MASTER_ADDR:-}" ]; then : "${MASTER:=$MASTER_ADDR:${PORT:-8080}}"; fi
[ -n "${GPUS:-}" ] || : "${NODES:=${DEFAULT_NODES:-1}}"
: "${NODES:=1}" "${GPUS:=$DEFAULT_GPUS}" "${BATCH_SIZE:=$DEFAULT_BATCH_SIZE}" "${PER_DEVICE_BATCH_SIZE:=$DEFAULT_PER_DEVICE_BATCH_SIZE}"

fail() {
    echo "error: $1" >&2
    exit 2
}

# Ends the script with a command. Settings of NPU have to be there before Python is, and scripts of Ascend that belong to them
# need bash, and no complaint about variables that are not set.
settings=$LAUNCH_DIR/../../../../tools/npu/env.sh
start() {
    if [ "$DEVICE" = npu ] && [ -f "$settings" ]; then
        exec bash -c 'settings() { . "$0"; }; settings; exec "$@"' "$settings" "$@"
    fi
    exec "$@"
}

case ${MAX_RESTARTS:-0} in
    *[!0-9]*) fail "MAX_RESTARTS must be a number, not '$MAX_RESTARTS'" ;;
esac
if [ -z "${TENSOR_PARALLEL:-}" ]; then # the script's, where there are so many
    TENSOR_PARALLEL=${DEFAULT_TENSOR_PARALLEL:-1}
    if [ "$TENSOR_PARALLEL" -gt "$GPUS" ]; then TENSOR_PARALLEL=1; fi
fi
for number in "$GPUS" "$NODES" "$BATCH_SIZE" "$PER_DEVICE_BATCH_SIZE" "$TENSOR_PARALLEL"; do
    case $number in
        0* | *[!0-9]*)
            fail "GPUS, NODES, BATCH_SIZE, PER_DEVICE_BATCH_SIZE and TENSOR_PARALLEL must be positive numbers, not '$number'"
            ;;
    esac
done
[ $((GPUS % NODES)) -eq 0 ] || fail "GPUS=$GPUS processes cannot be divided over NODES=$NODES machines: GPUS counts all of them"
per_node=$((GPUS / NODES))

# Devices that divide every layer have the same samples.
[ $((GPUS % TENSOR_PARALLEL)) -eq 0 ] || fail "GPUS=$GPUS is not a multiple of TENSOR_PARALLEL=$TENSOR_PARALLEL: change one of them"
at_once=$((PER_DEVICE_BATCH_SIZE * GPUS / TENSOR_PARALLEL))
shares=$([ "$TENSOR_PARALLEL" -eq 1 ] || echo " / TENSOR_PARALLEL=$TENSOR_PARALLEL")
[ $((BATCH_SIZE % at_once)) -eq 0 ] || fail "BATCH_SIZE=$BATCH_SIZE is not a multiple of PER_DEVICE_BATCH_SIZE=$PER_DEVICE_BATCH_SIZE \
times GPUS=$GPUS$shares ($at_once): change one of them"

on_slurm() {
    tasks=$((GPUS < ${GPUS_PER_NODE:-8} ? GPUS : ${GPUS_PER_NODE:-8}))
    [ $((GPUS % tasks)) -eq 0 ] || fail "GPUS=$GPUS is not a multiple of GPUS_PER_NODE=$tasks: change one of them"
    NODES=$((GPUS / tasks)) SLURM_PARTITION_USED=$PARTITION PARTITION=
    export NODES GPUS PARTITION SLURM_PARTITION_USED
    # Words of SRUN_ARGS are arguments of their own; each machine's number and the first one's name are known only there.
    # shellcheck disable=SC2016,SC2086
    exec srun -p "$SLURM_PARTITION_USED" --gres=gpu:"$tasks" --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 \
        --cpus-per-task=$((${CPUS_PER_TASK:-10} * tasks)) --kill-on-bad-exit=1 \
        ${QUOTA_TYPE:+--quotatype="$QUOTA_TYPE"} ${SRUN_ARGS:-} sh -c '
            NODE_RANK=${SLURM_NODEID:-0}
            MASTER=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}" | head -n 1):${PORT:-8080}
            export NODE_RANK MASTER
            exec sh "$0" "$@"' "$0" "$@"
}

dry=false
for argument in "$@"; do
    if [ "$argument" = --dry_run ]; then dry=true; fi
done
if [ -n "${PARTITION:-}" ] && ! $dry; then
    on_slurm "$@"
fi

case $PRECISION in
    bf16) set -- --bf16 True --fp16 False --fp16_opt_level O2 --amp_master_grad True "$@" ;;
    fp16) set -- --bf16 False --fp16 True --fp16_opt_level O2 --amp_master_grad True "$@" ;;
    fp32) set -- --bf16 False --fp16 False "$@" ;;
    *) fail "PRECISION is '$PRECISION': use bf16, fp16 or fp32" ;;
esac

launch() {
    trainer=$1
    shift
    if $dry; then
        start "$PYTHON" "$trainer" --processes "$GPUS" "$@"
    fi

    mkdir -p "$OUTPUT_DIR"
    if [ "$GPUS" -eq 1 ]; then
        start "$PYTHON" "$trainer" "$@"
    fi

    # Each process writes its log to a file of its own; the first one's also goes to the terminal.
    logs=$OUTPUT_DIR/launch_logs
    if [ "$NODES" -gt 1 ]; then # which may share this folder
        logs=$logs/${NODE_RANK:+node}${NODE_RANK:-$(uname -n)}
    fi
    set -- --run_mode collective --log_dir "$logs" "$trainer" "$@"
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
    if [ "${MAX_RESTARTS:-0}" -eq 0 ]; then
        start "$PYTHON" -m paddle.distributed.launch "$@"
    fi
    again "$@"
}

# The launcher, started again when it fails, from the last checkpoint of OUTPUT_DIR; not when somebody has ended this script.
again() {
    restarts=0 stopped=false child=
    trap 'stopped=true; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || :' TERM INT HUP
    while :; do
        start "$PYTHON" -m paddle.distributed.launch "$@" &
        child=$! status=0
        wait "$child" || status=$?
        while kill -0 "$child" 2>/dev/null; do # a signal ends the wait, not the launcher
            wait "$child" || status=$?
        done
        if [ "$status" -eq 0 ] || $stopped || [ "$restarts" -ge "$MAX_RESTARTS" ]; then
            exit "$status"
        fi
        restarts=$((restarts + 1))
        echo "the run ended with status $status: start $restarts of $MAX_RESTARTS again, from the last checkpoint" >&2
    done
}
