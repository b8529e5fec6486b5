#!/bin/sh
# Zero-shot retrieval on XTD in eight languages with InternVL-G. Variables and arguments: see run.sh.
set -eu
MODE=InternVL-G

. "$(dirname "$0")/run.sh"

for language in en es fr zh it ko ru jp; do
    retrieve "xtd_$language" coco "multilingual_mscoco_captions/test_1kcaptions_$language.txt" \
        --names "$DATA_ROOT/multilingual_mscoco_captions/test_image_names.txt"
done
