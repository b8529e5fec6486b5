#!/bin/sh
# MME: mme.sh CHECKPOINT. Variables and arguments: see run.sh.
set -eu
TASK=mme

. "$(dirname "$0")/run.sh"
