#!/bin/sh
# TextVQA: textvqa.sh CHECKPOINT. Variables and arguments: see run.sh.
set -eu
TASK=textvqa

. "$(dirname "$0")/run.sh"
