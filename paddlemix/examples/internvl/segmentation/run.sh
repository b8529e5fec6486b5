# What the scripts of this folder have in common: segmentation of ADE20K with InternViT-6B at 504 pixels. They set HEAD, STEPS, SHARE,
# WARMUP, whether the tower learns (TUNE), which of its blocks the head sees, and NAME, and source this file.
#
# From the environment (defaults in brackets):
#   MODEL [OpenGVLab/InternViT-6B-224px]  the tower
#   DATA [data/ade/ADEChallengeData2016]  pictures and labels
#   OUTPUT_DIR [work_dirs/NAME]           for the head and its score
#   GPUS [8]  processes that share the windows of an update    DEVICE [auto]  PYTHON [python]
# Arguments of the script are handed on to segmentation.py, after those below, so that they replace them.

: "${GPUS:=8}" "${OUTPUT_DIR:=work_dirs/$NAME}" "${PYTHON:=python}"
if $TUNE; then
    set -- --tune_tower --layer_decay 0.95 --drop_path_rate 0.4 --weight_decay 0.05 "$@"
fi
# Numbers of blocks are arguments of their own.
# shellcheck disable=SC2086
set -- "$(dirname "$SCRIPTS")/segmentation.py" --model_name_or_path "${MODEL:-OpenGVLab/InternViT-6B-224px}" \
    --data "${DATA:-data/ade/ADEChallengeData2016}" --out "$OUTPUT_DIR" --device "${DEVICE:-auto}" --head "$HEAD" --classes 150 \
    --crop 504 --stride 322 --steps "$STEPS" --warmup "$WARMUP" --blocks $BLOCKS --train_batch_size 16 --learning_rate 4e-5 --share "$SHARE" "$@"
if [ "$GPUS" -gt 1 ]; then
    set -- -m paddle.distributed.launch --nproc_per_node "$GPUS" --log_dir "$OUTPUT_DIR/logs" "$@"
fi
exec "$PYTHON" "$@"
