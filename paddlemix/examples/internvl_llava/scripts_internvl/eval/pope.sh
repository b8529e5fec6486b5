#!/bin/sh
# POPE: pope.sh CHECKPOINT. Variables and arguments: see run.sh.
set -eu
TASK=pope

. "$(dirname "$0")/run.sh"
