#!/bin/sh
# Any script of this folder on the machines of a Slurm job:
#   GPUS=16 sbatch --nodes=2 --gres=gpu:8 --ntasks-per-node=1 paddlemix/examples/internvl2/shell/slurm.sh SCRIPT [ARGUMENTS]
# or inside an allocation:
#   GPUS=16 sh paddlemix/examples/internvl2/shell/slurm.sh SCRIPT [ARGUMENTS]
# GPUS counts the devices of all nodes; PORT [8080] must be free on the first one.
#SBATCH --job-name=internvl-finetune
#SBATCH --ntasks-per-node=1
set -eu

MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):${PORT:-8080}
NODES=$SLURM_JOB_NUM_NODES
export MASTER NODES
# Each node's own number is known only there.
# shellcheck disable=SC2016
exec srun sh -c 'NODE_RANK=$SLURM_NODEID; export NODE_RANK; exec sh "$@"' sh "$@"
