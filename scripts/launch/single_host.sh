#!/bin/bash
# The handbook's 7B DPO on one host with 8 GPUs, which one process sees. Started again where it was only told to stop.
#   scripts/launch/single_host.sh runs/zephyr [--config.x=y ...]
set -u
workdir=${1:?directory of the run}
shift
until python scripts/train.py --config=experiments/handbook/zephyr_7b_dpo.py --workdir="$workdir" "$@"; do
    status=$?
    [ "$status" -eq 143 ] || exit "$status"
done
