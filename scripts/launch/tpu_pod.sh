#!/bin/bash
# Runs an experiment on a TPU pod slice, one process a host; --processes=auto lets JAX ask the TPU for the others. The
# slice's name and zone come first, then the options of `prefalign train`:
#   scripts/launch/tpu_pod.sh NAME ZONE --config=handbook/zephyr_7b_dpo --workdir=/mnt/runs/zephyr [--config.x=y ...]
# On every host: this repository in ~/prefalign_jax, installed with pip install -e ".[tpu]", and the workdir on a file
# system that all share, such as Filestore. A slice is made by, for one,
#   gcloud compute tpus tpu-vm create NAME --zone=ZONE --accelerator-type=v5p-32 --version=v2-alpha-tpuv5
set -u
trap 'exit 143' INT TERM
name=${1:?name of the slice} zone=${2:?its zone}
shift 2
command="cd prefalign_jax && python scripts/train.py --processes=auto$(printf ' %q' "$@")"
until gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$command"; do
    status=$?
    [ "$status" -eq 143 ] || exit "$status"
done
