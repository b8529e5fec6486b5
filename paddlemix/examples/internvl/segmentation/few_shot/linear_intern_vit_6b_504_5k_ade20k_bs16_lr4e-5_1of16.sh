#!/bin/sh
# A linear head and the tower learn from one picture in 16. Variables and arguments: see ../run.sh.
set -eu
SCRIPTS=$(cd "$(dirname "$0")/.." && pwd)
NAME=linear_intern_vit_6b_504_5k_ade20k_bs16_lr4e-5_1of16
HEAD=linear
WARMUP=100
STEPS=5000
TUNE=true BLOCKS=47
SHARE=16

. "$SCRIPTS/run.sh"
