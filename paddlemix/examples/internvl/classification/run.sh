# What the scripts of this folder have in common: probes of a frozen tower. They set TOWER, SIZE and PROBE, and source this file.
#
# From the environment (defaults in brackets):
#   MODEL [OpenGVLab/TOWER]     the tower
#   DATA_ROOT [data]            has imagenet-1k/train and imagenet-1k/val; imagenetv2, imagenet-a, imagenet-r and imagenet-sketch are
#                               tested too where they are there
#   OUTPUT_DIR [work_dirs/...]  for the probe, its scores and features
#   DEVICE [auto]  PYTHON [python]
# Arguments of the script are handed on to linear_probe.py, after those below, so that they replace them.

: "${DATA_ROOT:=data}"
set -- --train_batch_size 512 --epochs 10 --learning_rate 0.1 --augment "$@"
for set in imagenetv2 imagenet-a imagenet-r imagenet-sketch; do
    [ ! -d "$DATA_ROOT/$set" ] || set -- "$DATA_ROOT/$set" "$@"
done
exec "${PYTHON:-python}" "$(dirname "$SCRIPTS")/linear_probe.py" --model_name_or_path "${MODEL:-OpenGVLab/$TOWER}" --probe "$PROBE" \
    --image_size "$SIZE" --device "${DEVICE:-auto}" --out "${OUTPUT_DIR:-work_dirs/$NAME}" --data "$DATA_ROOT/imagenet-1k/train" \
    --val "$DATA_ROOT/imagenet-1k/val" "$@"
