#!/bin/sh
# Zero-shot classification on ImageNet and its relatives with InternVL-G. Variables and arguments: see run.sh.
set -eu
MODE=InternVL-G

. "$(dirname "$0")/run.sh"

classify imagenet-1k imagenet-1k/val en imagenet1k
classify imagenet-v2 imagenetv2 en imagenet1k
classify imagenet-sketch imagenet-sketch en imagenet1k
classify imagenet-a imagenet-a en imagenet-a
classify imagenet-r imagenet-r en imagenet-r
classify objectnet objectnet en objectnet
for language in cn jp ar it; do
    classify "imagenet-1k_$language" imagenet-1k/val "$language" imagenet1k
done
