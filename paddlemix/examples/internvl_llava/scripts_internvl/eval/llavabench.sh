#!/bin/sh
# LLaVA-Bench (in the wild): llavabench.sh CHECKPOINT. Variables and arguments: see run.sh.
set -eu
TASK=llavabench

. "$(dirname "$0")/run.sh"
