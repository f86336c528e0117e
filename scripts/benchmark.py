"""Measures a part of the package: python scripts/benchmark.py import --params=1e9 --dtype=stored --out=FILE.json."""

import sys

from benchmarks import checkpoints, decoding, gpu, members, peers, pipeline, prefix_sharing, step_cost, tokenizing
from benchmarks.measuring import run
from prefalign_jax.exits import status_of

BENCHMARKS = {
    "import": checkpoints.import_,
    "memory": step_cost.memory,
    "decode": decoding.decode,
    "train": peers.train,
    "gpu": gpu.gpu,
    "members": members.members,
    "pack": pipeline.pack,
    "data": pipeline.data,
    "cost": step_cost.cost,
    "prefix": prefix_sharing.prefix,
    "tokenize": tokenizing.tokenize,
}

if __name__ == "__main__":
    sys.exit(status_of(lambda: run(BENCHMARKS, sys.argv[1:])))
