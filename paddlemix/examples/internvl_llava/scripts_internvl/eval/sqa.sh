#!/bin/sh
# ScienceQA: sqa.sh CHECKPOINT. Variables and arguments: see run.sh.
set -eu
TASK=sqa

. "$(dirname "$0")/run.sh"
