#!/bin/bash
# The handbook's 7B DPO on a TPU pod slice, one process a host; --processes=auto lets JAX ask the TPU for the others.
#   scripts/launch/tpu_pod.sh NAME ZONE /mnt/runs/zephyr [--config.x=y ...]
# On every host: this repository in ~/prefalign_jax, installed with pip install -e ".[tpu]", and the directory on a
# file system that all share, such as Filestore. A slice is made by, for one,
#   gcloud compute tpus tpu-vm create NAME --zone=ZONE --accelerator-type=v5p-32 --version=v2-alpha-tpuv5
set -u
name=${1:?name of the slice} zone=${2:?its zone} workdir=${3:?a directory that all hosts share}
shift 3
command="cd prefalign_jax && python scripts/train.py --processes=auto"
command+=" --config=experiments/handbook/zephyr_7b_dpo.py --workdir=$workdir $*"
until gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$command"; do
    status=$?
    [ "$status" -eq 143 ] || exit "$status"
done
