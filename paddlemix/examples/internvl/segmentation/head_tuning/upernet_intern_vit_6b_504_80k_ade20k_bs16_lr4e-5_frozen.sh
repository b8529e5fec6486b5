#!/bin/sh
# UperNet on the frozen tower. Variables and arguments: see ../run.sh.
set -eu
SCRIPTS=$(cd "$(dirname "$0")/.." && pwd)
NAME=upernet_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5_frozen
HEAD=upernet
WARMUP=1500
STEPS=80000
TUNE=false BLOCKS="11 23 35 47"
SHARE=1

. "$SCRIPTS/run.sh"
