"""What the sides that run on JAX say of their device; needs JAX alone, since peers run without this package."""

import resource
from typing import Any

import jax


def device_figures() -> dict[str, Any]:
    """Its kind, and the most memory in use, which is the process's where the device does not say."""
    device = jax.local_devices()[0]
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "device": device.device_kind,
        "peak_bytes": peak or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
