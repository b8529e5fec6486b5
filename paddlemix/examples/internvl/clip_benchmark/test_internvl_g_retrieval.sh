#!/bin/sh
# Zero-shot retrieval on Flickr30K and COCO, in English and Chinese, with InternVL-G. Variables and arguments: see run.sh.
set -eu
MODE=InternVL-G

. "$(dirname "$0")/run.sh"

retrieve flickr30k flickr30k/Images flickr30k/flickr30k_test_karpathy.txt
retrieve flickr30k_cn flickr30k/Images flickr30k/flickr30k_cn_test.txt
retrieve coco coco coco/annotations/coco_karpathy_test.json
retrieve coco_cn coco coco/annotations/coco-cn_test.txt
