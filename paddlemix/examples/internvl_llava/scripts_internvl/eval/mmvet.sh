#!/bin/sh
# MM-Vet: mmvet.sh CHECKPOINT. Variables and arguments: see run.sh.
set -eu
TASK=mmvet

. "$(dirname "$0")/run.sh"
