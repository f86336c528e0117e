#!/bin/bash
# Runs an experiment on one host, in one process that sees all of its GPUs, with the options of `prefalign train`:
#   scripts/launch/single_host.sh --config=handbook/zephyr_7b_dpo --workdir=runs/zephyr [--config.x=y ...]
# A run that was told to stop is started again, unless this script was told so too: by Ctrl-C, which both get.
set -u
trap 'exit 143' INT TERM
until prefalign train "$@"; do
    status=$?
    [ "$status" -eq 143 ] || exit "$status"
done
