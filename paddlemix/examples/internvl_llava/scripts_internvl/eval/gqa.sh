#!/bin/sh
# GQA: gqa.sh CHECKPOINT. Variables and arguments: see run.sh.
set -eu
TASK=gqa

. "$(dirname "$0")/run.sh"
