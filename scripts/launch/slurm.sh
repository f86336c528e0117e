#!/bin/bash
# The handbook's 7B DPO on two nodes with 8 GPUs each, one process a GPU, which JAX learns from SLURM.
#   sbatch scripts/launch/slurm.sh /shared/runs/zephyr [--config.x=y ...]
#SBATCH --job-name=zephyr_7b_dpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# --signal: five minutes before the time is up the processes are told to stop, save at one step and exit with 143. So do
# the others where a node is lost. The job then waits in the queue again, and the same command goes on.
workdir=${1:?a directory that all nodes share}
shift
srun python scripts/train.py --config=experiments/handbook/zephyr_7b_dpo.py --workdir="$workdir" "$@"
status=$?
[ "$status" -ne 143 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$status"
