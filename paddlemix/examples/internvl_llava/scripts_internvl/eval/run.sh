# What the scripts of this folder have in common: SCRIPT.sh CHECKPOINT [ARGUMENTS of evaluate.py].
#
# From the environment (defaults in brackets):
#   DATA_ROOT [playground/data/eval]  folder of the sets
#   OUT_DIR [results/CHECKPOINT's name]  folder for answers and scores
#   GPUS [1]                          processes that share the work
#   DEVICE [auto]  PYTHON [python]
[ $# -ge 1 ] || { echo "usage: $0 CHECKPOINT [ARGUMENTS]" >&2; exit 2; }
checkpoint=$1
shift
exec "${PYTHON:-python}" "$(dirname "$0")/../../../internvl2/evaluate.py" --model_name_or_path "$checkpoint" --task "llava-$TASK" \
    --data_root "${DATA_ROOT:-playground/data/eval}" --out_dir "${OUT_DIR:-results/$(basename "$checkpoint")}" \
    --processes "${GPUS:-1}" --device "${DEVICE:-auto}" "$@"
