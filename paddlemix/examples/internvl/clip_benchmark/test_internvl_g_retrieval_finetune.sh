#!/bin/sh
# Retrieval with what was fine-tuned on Flickr30K, Flickr30K-CN and COCO, with InternVL-C and -G. Variables and arguments: see run.sh.
set -eu
MODE=InternVL-C
: "${WORK_DIR:=work_dirs}"

. "$(dirname "$0")/run.sh"

for MODE in InternVL-C InternVL-G; do
    MODEL=$WORK_DIR/internvl_stage2_finetune_flickrcn_364_bs1024_ep10
    retrieve finetuned_flickr30k_cn flickr30k/Images flickr30k/flickr30k_cn_test.txt
    MODEL=$WORK_DIR/internvl_stage2_finetune_flickr_364_bs1024_ep10
    retrieve finetuned_flickr30k flickr30k/Images flickr30k/flickr30k_test_karpathy.txt
    MODEL=$WORK_DIR/internvl_stage2_finetune_coco_364_bs1024_ep5
    retrieve finetuned_coco coco coco/annotations/coco_karpathy_test.json
done
