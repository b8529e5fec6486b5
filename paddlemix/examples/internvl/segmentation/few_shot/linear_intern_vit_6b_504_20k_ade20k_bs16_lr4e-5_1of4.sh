#!/bin/sh
# A linear head and the tower learn from one picture in 4. Variables and arguments: see ../run.sh.
set -eu
SCRIPTS=$(cd "$(dirname "$0")/.." && pwd)
NAME=linear_intern_vit_6b_504_20k_ade20k_bs16_lr4e-5_1of4
HEAD=linear
WARMUP=1500
STEPS=20000
TUNE=true BLOCKS=47
SHARE=4

. "$SCRIPTS/run.sh"
