#!/bin/sh
# VQAv2: vqav2.sh CHECKPOINT. Variables and arguments: see run.sh.
set -eu
TASK=vqav2

. "$(dirname "$0")/run.sh"
