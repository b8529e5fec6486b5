#!/bin/sh
# MMBench: mmbench.sh CHECKPOINT. Variables and arguments: see run.sh.
set -eu
TASK=mmbench

. "$(dirname "$0")/run.sh"
