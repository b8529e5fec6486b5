#!/bin/sh
# VizWiz: vizwiz.sh CHECKPOINT. Variables and arguments: see run.sh.
set -eu
TASK=vizwiz

. "$(dirname "$0")/run.sh"
