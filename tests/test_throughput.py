"""Rates of a training loop, by a clock that the test moves."""

import numpy as np
import pytest

from prefalign_jax.cost import throughput
from prefalign_jax.cost.throughput import Meter
from prefalign_jax.data.pipeline import batch_of, make_pair_set
from small import make_pairs


class Clock:
    """Stands for the module `time`."""

    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(throughput, "time", made)
    return made


def test_what_is_counted_is_the_pairs_tokens_once_and_the_time_of_training_alone(clock):
    pairs = make_pairs(8)
    data = make_pair_set(pairs, 4)
    batches = [batch_of(data, np.arange(4)), batch_of(data, np.arange(4, 8))]
    asked = []
    found = Meter(data, lambda batch: asked.append(batch) or 1000)

    def slow():
        for batch in batches:
            clock.now += 0.5  # waited for
            yield batch

    for batch in found.waited(slow()):
        clock.now += 1.5
        found.add(batch, batch)
        with found.paused():
            clock.now += 60
    rates = found.read()
    # A tree of prompt and two responses, whose last tokens are read by no one.
    tokens = sum(len(p.prompt) + len(p.chosen) - 1 + len(p.rejected) - 1 for p in pairs)
    positions = sum(batch.segments.size for batch in batches)
    assert tokens == sum(np.count_nonzero(batch.segments) for batch in batches) < positions
    assert rates["step_time"] == 2.0 and rates["input_wait"] == 0.25
    assert rates["pairs_per_second"] == 2.0 and rates["tokens_per_second"] == tokens / 4
    assert rates["trained_tokens_per_second"] == sum(len(p.chosen) + len(p.rejected) for p in pairs) / 4
    assert rates["packing_efficiency"] == tokens / positions
    assert rates["flops"] == 2000 and len(asked) == len({batch.segments.shape for batch in batches})

    clock.now += 1  # and starts anew
    found.add(batches[0], batches[0])
    assert found.read()["step_time"] == 1.0
