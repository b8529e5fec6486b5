#!/bin/sh
# Linear probe of InternViT-6B-224px on ImageNet-1K at 224 pixels. Variables and arguments: see ../run.sh.
set -eu
SCRIPTS=$(cd "$(dirname "$0")/.." && pwd)
NAME=linear_probing_intern_vit_6b_224px_in1k_224_64gpu
TOWER=InternViT-6B-224px
SIZE=224
PROBE=linear

. "$SCRIPTS/run.sh"
