#!/bin/sh
# A linear head and the tower learn from all pictures. Variables and arguments: see ../run.sh.
set -eu
SCRIPTS=$(cd "$(dirname "$0")/.." && pwd)
NAME=linear_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5_1of1
HEAD=linear
WARMUP=1500
STEPS=80000
TUNE=true BLOCKS=47
SHARE=1

. "$SCRIPTS/run.sh"
