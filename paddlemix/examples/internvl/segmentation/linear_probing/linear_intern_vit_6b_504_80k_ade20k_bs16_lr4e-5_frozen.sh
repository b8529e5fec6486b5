#!/bin/sh
# A linear head on the frozen tower. Variables and arguments: see ../run.sh.
set -eu
SCRIPTS=$(cd "$(dirname "$0")/.." && pwd)
NAME=linear_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5_frozen
HEAD=linear
WARMUP=1500
STEPS=80000
TUNE=false BLOCKS=44
SHARE=1

. "$SCRIPTS/run.sh"
