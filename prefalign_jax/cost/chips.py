"""Devices that a step can be planned for, as their makers describe them."""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """What one device can do.

    Attributes:
      memory: bytes.
      flops: dense bfloat16 operations a second.
      link: bytes a second that it sends to devices of its own host, or of its slice for TPUs.
      network: the same to others.
      host: devices that `link` connects.
      source: of these figures.
    """

    memory: float
    flops: float
    link: float
    network: float
    host: int
    source: str


_NVIDIA = "NVIDIA's data sheet of the SXM module; network: one {} InfiniBand port a GPU"
_GOOGLE = "docs.cloud.google.com/tpu/docs/{}: key specifications; half of a bidirectional bandwidth counts"
CHIPS: dict[str, Chip] = {
    "a100": Chip(80e9, 312e12, 300e9, 25e9, 8, _NVIDIA.format("200 Gb/s")),
    "h100": Chip(80e9, 989e12, 450e9, 50e9, 8, _NVIDIA.format("400 Gb/s")),
    "h200": Chip(141e9, 989e12, 450e9, 50e9, 8, _NVIDIA.format("400 Gb/s")),
    "tpu-v4": Chip(32e9, 275e12, 300e9, 6.25e9, 4096, _GOOGLE.format("v4")),
    "tpu-v5e": Chip(16e9, 197e12, 200e9, 3.1e9, 256, _GOOGLE.format("v5e")),
    "tpu-v5p": Chip(95e9, 459e12, 600e9, 6.25e9, 8960, _GOOGLE.format("v5p")),
    "tpu-v6e": Chip(32e9, 918e12, 400e9, 6.25e9, 256, _GOOGLE.format("v6e")),
}
