#!/bin/sh
# Linear probe of InternViT-6B-448px-V1-2 on ImageNet-1K at 448 pixels. Variables and arguments: see ../run.sh.
set -eu
SCRIPTS=$(cd "$(dirname "$0")/.." && pwd)
NAME=linear_probing_intern_vit_6b_448px_v1_2_in1k_448_64gpu
TOWER=InternViT-6B-448px-V1-2
SIZE=448
PROBE=linear

. "$SCRIPTS/run.sh"
