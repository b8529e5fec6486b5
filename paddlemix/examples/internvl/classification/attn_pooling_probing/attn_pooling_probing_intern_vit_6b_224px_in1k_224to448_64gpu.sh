#!/bin/sh
# Attention-pooling probe of InternViT-6B-224px on ImageNet-1K at 448 pixels. Variables and arguments: see ../run.sh.
set -eu
SCRIPTS=$(cd "$(dirname "$0")/.." && pwd)
NAME=attn_pooling_probing_intern_vit_6b_224px_in1k_224to448_64gpu
TOWER=InternViT-6B-224px
SIZE=448
PROBE=attention

. "$SCRIPTS/run.sh"
