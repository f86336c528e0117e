"""What a training loop gets done in a second."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from prefalign_jax.data.pipeline import PairSet
from prefalign_jax.metrics import device_memory
from prefalign_jax.types import PreferenceBatch


class Meter:
    """Tokens, pairs, operations and seconds since the last logged step, counted on the host for all devices.

    Args:
      data: what the batches are of.
      flops_of: of a step.
      members: runs that a step is of; this one's share of its time, tokens and operations is counted.
    """

    def __init__(self, data: PairSet, flops_of: Callable[[PreferenceBatch], int], members: int = 1):
        self.data, self.members = data, members
        self.flops_of, self.known = flops_of, {}  # a count for each shape of batch
        self.reset()

    def reset(self) -> None:
        """Counts from nothing, from now."""
        self.began = time.monotonic()
        self.steps = self.tokens = self.trained = self.positions = self.flops = 0
        self.waiting = 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time of what is no training, such as evaluation."""
        stopped = time.monotonic()
        yield
        self.began += time.monotonic() - stopped

    def waited(self, batches: Iterator[PreferenceBatch]) -> Iterator[PreferenceBatch]:
        """The batches; the time that they are waited for is counted."""
        while True:
            began = time.monotonic()
            batch = next(batches, None)
            self.waiting += time.monotonic() - began
            if batch is None:
                return
            yield batch

    def add(self, batch: PreferenceBatch, on_devices: PreferenceBatch) -> None:
        """Counts one batch, given as NumPy arrays and as it lies on the devices."""
        self.steps += 1
        for index in batch.index:
            lengths = self.data.laid_out(index[index >= 0])
            self.tokens += int(lengths.pieces.sum())
            self.trained += int(lengths.trained.sum())
        self.positions += on_devices.segments.size / self.members
        shapes = on_devices.tokens.shape, on_devices.target.shape, on_devices.tiles.shape
        if shapes not in self.known:
            self.known[shapes] = self.flops_of(on_devices)
        self.flops += self.known[shapes] // self.members

    def read(self) -> dict[str, float]:
        """Rates since the last reading, and starts anew."""
        whole = max(time.monotonic() - self.began, 1e-9)
        seconds = whole / self.members
        out = {
            "step_time": seconds / self.steps,
            "pairs_per_second": self.steps * self.data.batch_size / seconds,
            "tokens_per_second": self.tokens / seconds,
            "trained_tokens_per_second": self.trained / seconds,
            "packing_efficiency": self.tokens / self.positions,
            "input_wait": self.waiting / whole,
            "flops": self.flops,
            **device_memory(),
        }
        self.reset()
        return out
