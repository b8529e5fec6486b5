# What the scripts of this folder have in common: each of their lines is a command of zero-shot evaluation.
#
# From the environment (defaults in brackets):
#   MODEL [OpenGVLab/InternVL-14B-224px]  the checkpoint
#   DATA_ROOT [data]       folder of the data sets
#   TEXTS                  folder with LANGUAGE_classnames.json and LANGUAGE_zeroshot_classification_templates.json, as
#                          clip_benchmark has them [names of the class folders, and four English templates]
#   OUT_DIR [results]      a folder for each result comes into it; an interrupted run goes on from there
#   GPUS [1]  processes that share the work      DEVICE [auto]  PYTHON [python]
# Arguments of the script are handed on to each command. --dry_run prints the commands and starts nothing. Data that are not there
# are left out, and told.

COMMANDS=$(cd "$(dirname "$0")/.." && pwd)
: "${MODEL:=OpenGVLab/InternVL-14B-224px}" "${DATA_ROOT:=data}" "${OUT_DIR:=results}" "${GPUS:=1}" "${DEVICE:=auto}"
: "${PYTHON:=python}" "${TEXTS:=}"
dry=false
if [ "${1:-}" = --dry_run ]; then
    dry=true
    shift
fi
# Words of these are arguments of their own for every command; names of files in them must have no blanks.
MORE=$*

# evaluate COMMAND NAME DATA ARGUMENTS...
evaluate() {
    command=$1 name=$2 data=$3
    shift 3
    if ! $dry && [ ! -e "$data" ]; then
        echo "left out: $name ($data is not there)" >&2
        return 0
    fi
    # shellcheck disable=SC2086
    set -- "$COMMANDS/$command.py" --model_name_or_path "$MODEL" --mode "$MODE" --device "$DEVICE" --out "$OUT_DIR/$name" "$@" $MORE
    if [ "$GPUS" -gt 1 ]; then
        set -- -m paddle.distributed.launch --nproc_per_node "$GPUS" --log_dir "$OUT_DIR/$name/logs" "$@"
    fi
    if $dry; then
        echo "$PYTHON $*"
    else
        echo "== $name"
        "$PYTHON" "$@"
    fi
}

# classify NAME FOLDER LANGUAGE LIST: a folder of class folders below DATA_ROOT; LIST is the data set's name in the texts.
classify() {
    name=${MODE#InternVL-}_$1 data=$DATA_ROOT/$2
    if [ -n "$TEXTS" ]; then
        evaluate zero_shot_classification "$name" "$data" --data "$data" --classnames "$TEXTS/$3_classnames.json#$4" \
            --templates "$TEXTS/$3_zeroshot_classification_templates.json#$4"
    elif [ "$3" = en ]; then
        evaluate zero_shot_classification "$name" "$data" --data "$data"
    else
        echo "left out: $name (TEXTS names no folder with $3_classnames.json)" >&2
    fi
}

# retrieve NAME IMAGES ANNOTATIONS [ARGUMENTS]: paths below DATA_ROOT.
retrieve() {
    name=${MODE#InternVL-}_$1 images=$DATA_ROOT/$2 annotations=$DATA_ROOT/$3
    shift 3
    evaluate retrieval "$name" "$annotations" --images "$images" --annotations "$annotations" "$@"
}
