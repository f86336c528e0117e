"""What the sides that run on JAX say of their device; needs JAX alone, since peers run without this package.

By itself it reads a specification with a dtype, and prints the rate of products beside that.
"""

import json
import resource
import sys
import time
from typing import Any

import jax
import numpy as np


def device_figures() -> dict[str, Any]:
    """Its kind, and the most memory in use, which is the process's where the device does not say."""
    device = jax.local_devices()[0]
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "device": device.device_kind,
        "peak_bytes": peak or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def matmul_rate(dtype: str, size: int = 8192) -> float:
    """Operations a second of plain products of random numbers, eight in a row: the median of five times."""
    if jax.default_backend() == "cpu":
        size //= 8 if dtype == "float32" else 32  # half precision is slow there
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready([product(x) for _ in range(8)])
        times.append((time.perf_counter() - began) / 8)
    return 2 * size**3 / float(np.median(times))


if __name__ == "__main__":
    print(json.dumps({**device_figures(), "matmul_flops": matmul_rate(json.loads(sys.argv[1])["dtype"])}))
