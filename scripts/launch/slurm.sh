#!/bin/bash
# Runs an experiment on nodes with 8 GPUs each, one process a GPU, which JAX learns from SLURM. Options of sbatch come
# before the script, those of `prefalign train` after it. The workdir is on a file system that all nodes share:
#   sbatch --nodes=2 scripts/launch/slurm.sh --config=handbook/zephyr_7b_dpo --workdir=/shared/zephyr [--config.x=y ...]
#SBATCH --job-name=prefalign
#SBATCH --nodes=1
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
srun prefalign train "$@"
status=$?
[ "$status" -ne 143 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$status"
