"""What sharing a prompt saves at published lengths: tokens and time of three layouts of the same pairs.

tree      each prompt once, both responses after it, pairs one after the other in a row
packed    each response after its own copy of the prompt, texts one after the other in a row
padded    each response after its own copy of the prompt, every text as long as the longest of the batch
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.inputs import EOS
from benchmarks.measuring import measured
from prefalign_jax.data.pipeline import batch_of, make_pair_set
from prefalign_jax.data.trees import Layout, lengths_of
from prefalign_jax.losses import make_loss
from prefalign_jax.models.decoder import DecoderConfig, make_decoder
from prefalign_jax.options import choose
from prefalign_jax.sharding import make_mesh
from prefalign_jax.train_step import init_state, make_train_step
from prefalign_jax.types import Pair, PreferenceBatch, UserError

LAYOUTS = ("tree", "packed", "padded")


class Published(NamedTuple):
    """A data set of arXiv 2410.20305.

    Tables 1 and 2 of the paper hold all but `spread`. Rates are pairs a second on 8 H100. The tables do not say what a
    length counts. Taken as a prompt and one response, the packed rates are nearly as many tokens a second for each set.

    Attributes:
      length: median number of tokens of a prompt with one response.
      ratio: median of the prompt's length over a response's.
      padded: rate of FlashAttention-3 with padded texts.
      packed: rate of FlashAttention-3 with packed texts.
      shared: rate of FlexAttention with shared prompts, packed.
      spread: standard deviation of the logarithm of lengths, of prompts and of responses. The paper does not state it.
    """

    length: int
    ratio: float
    padded: float
    packed: float
    shared: float
    # The authors pack Capybara into 3,968 tokens, 1.1 times the 95th percentile of a prompt with both responses. So the
    # sum is spread by 0.49, and each part by about 0.65. This is assumed of the others.
    spread: tuple[float, float] = (0.65, 0.65)


PUBLISHED = {
    "tldr": Published(416, 11.14, 31.43, 44.11, 59.76),
    "ultrafeedback": Published(409, 0.42, 18.40, 45.46, 53.21),
    "helpsteer": Published(775, 6.34, 14.83, 29.85, 44.10),
    "capybara": Published(1160, 1.59, 8.38, 17.89, 23.89),
    "hh-rlhf": Published(186, 2.15, 33.71, 109.77, 155.04, spread=(1.0, 0.9)),  # spread of its test files
    "metamath": Published(872, 3.91, 13.86, 24.21, 38.07),
}


def prefix(
    *,
    sets: str = ",".join(PUBLISHED),
    pairs: int = 8,
    batches: int = 64,
    shorter: int = 4,
    vocabulary: int = 2048,
    layers: int = 4,
    width: int = 512,
    steps: int = 3,
) -> dict[str, Any]:
    """A shared prompt beside packed and padded copies, at the lengths of six data sets: computed tokens and DPO's time.

    Args:
      sets: keys of PUBLISHED, with commas between.
      pairs: pairs in a batch.
      batches: batches whose tokens are counted.
      shorter: the timed batch has lengths divided by this; tokens are counted at full length.
      vocabulary, layers, width: size of the model that is timed.
      steps: timed steps of each layout, the first not counted.

    Returns:
      For each data set the tokens a pair and their ratios, the same ratios of the timed batch, seconds and processor
      seconds a step and their ratios, and the published ratios of rates.
    """
    names = sets.split(",")
    for name in names:
        choose("--sets", name, PUBLISHED)
    if min(pairs, batches, shorter, layers, steps - 1) < 1 or vocabulary < 3 or width < 64 or width % 64:
        raise UserError(
            "--pairs, --batches, --shorter and --layers must be positive, --steps at least 2, --vocabulary at least 3, "
            "--width a multiple of 64"
        )
    sizes = dict(pairs=pairs, batches=batches, shorter=shorter, steps=steps)
    model = dict(vocabulary=vocabulary, layers=layers, width=width)
    return measured("prefix_sharing.prefix_step", names=names, **sizes, model=model, devices=1)[0]


def prefix_step(
    names: Sequence[str], pairs: int, batches: int, shorter: int, steps: int, model: dict[str, int], devices: int
) -> dict[str, Any]:
    """The figures of `prefix`, in a process of its own."""
    figures: dict[str, Any] = {}
    for name in names:
        one = PUBLISHED[name]
        drawn = drawn_lengths(one, pairs * batches).reshape(batches, pairs, 3)
        tokens = np.array([[tokens_in(batch, layout) for layout in LAYOUTS] for batch in drawn]).sum(0)
        short = np.maximum(2, drawn // shorter)
        counts = np.array([[tokens_in(batch, layout) for layout in LAYOUTS] for batch in short])
        typical = np.argsort(counts[:, 2] / counts[:, 0])[batches // 2]
        seconds, busy = seconds_of(short[typical], steps, **model)
        for number, layout in enumerate(LAYOUTS):
            figures |= {
                f"{name}: tokens a pair, {layout}": tokens[number] / (batches * pairs),
                f"{name}: s a step, {layout}": seconds[number],
                f"{name}: CPU-s a step, {layout}": busy[number],
            }
        for number, layout in enumerate(LAYOUTS[1:], 1):
            ratio = f"{layout} over tree"
            figures |= {
                f"{name}: tokens, {ratio}": tokens[number] / tokens[0],
                f"{name}: tokens of the timed batch, {ratio}": counts[typical, number] / counts[typical, 0],
                f"{name}: time, {ratio}": seconds[number] / seconds[0],
                f"{name}: CPU time, {ratio}": busy[number] / busy[0],
                f"{name}: published, {ratio}": one.shared / getattr(one, layout),
            }
    return {key: float(value) for key, value in figures.items()}


def drawn_lengths(published: Published, count: int) -> np.ndarray:
    """[count, 3] tokens of prompt, chosen and rejected response: log-normal, with the stated medians.

    None is longer than 1.1 times the 95th percentile of its kind, which is how the authors bound a packed sequence.
    """
    rng, (of_prompts, of_responses) = np.random.default_rng(0), published.spread
    spread = np.array([of_prompts, of_responses, of_responses])
    factors = np.minimum(np.exp(spread * rng.normal(size=(count, 3))), 1.1 * np.exp(1.645 * spread))
    parts = np.array([published.ratio, 1.0, 1.0]) * factors
    texts = parts[:, :1] + parts[:, 1:]
    return np.maximum(2, np.rint(parts * published.length / np.median(texts))).astype(int)


def tokens_in(lengths: np.ndarray, layout: str) -> int:
    """How many tokens a batch of these lengths [B, 3] holds, without what rounds rows up."""
    pairs = [Pair(*(np.zeros(n, np.int32) for n in three)) for three in lengths]
    return int(lengths_of(*laid_out(pairs, layout)).pieces.sum())


def laid_out(pairs: Sequence[Pair], layout: str) -> tuple[list[Pair], Layout]:
    """(the pairs of a batch, what of them to lay out); those to pad get filler that is computed and not trained."""
    if layout != "padded":
        return list(pairs), Layout(tree=layout == "tree")
    longest = max(len(pair.prompt) + len(response) for pair in pairs for response in pair.responses)

    def filled(pair: Pair) -> Pair:
        fillers = [longest - len(pair.prompt) - len(response) for response in pair.responses]
        responses = [np.pad(x, (0, n), constant_values=EOS) for x, n in zip(pair.responses, fillers, strict=True)]
        weights = [np.pad(np.ones(len(x), np.float32), (0, n)) for x, n in zip(pair.responses, fillers, strict=True)]
        return Pair(pair.prompt, *responses, token_weights=tuple(weights))

    return [filled(pair) for pair in pairs], Layout(tree=False)


def seconds_of(lengths: np.ndarray, steps: int, *, vocabulary: int, layers: int, width: int) -> np.ndarray:
    """Times DPO steps on the same pairs in each of LAYOUTS, in turn.

    Returns:
      [2, LAYOUTS] medians of seconds and of processor seconds a step; the first step is not counted.

    Raises:
      UserError: the layouts give different log-probabilities.
    """
    heads = width // 64
    config = DecoderConfig(vocabulary, width, 3 * width, layers, heads, heads, 64, tie_embeddings=True)
    model, mesh = make_decoder(config), make_mesh({"data": 1}, jax.devices()[:1])
    optimizer = optax.adamw(0.0, weight_decay=0.0)  # so that every step sees the same weights
    rng = np.random.default_rng(0)
    pairs = [Pair(*(rng.integers(1, vocabulary, n).astype(np.int32) for n in three)) for three in lengths]

    def batch_in(layout: str) -> PreferenceBatch:
        those, how = laid_out(pairs, layout)
        return batch_of(make_pair_set(those, len(those), layout=how, attends=model.attends), np.arange(len(those)))

    batches = [batch_in(layout) for layout in LAYOUTS]
    params = model.init(jax.random.key(0))
    state = init_state(params, optimizer, mesh, jax.tree.map(jnp.copy, params))
    del params
    step, seconds = make_train_step(model, make_loss("dpo"), optimizer, mesh), []
    for _ in range(steps):
        logps, taken = [], []
        for batch in batches:
            began = np.array([time.perf_counter(), time.process_time()])
            state, metrics = step(state, batch)
            logps.append([float(metrics[f"logps/{side}"]) for side in ("chosen", "rejected")])
            taken.append(np.array([time.perf_counter(), time.process_time()]) - began)
        refuse_others(logps)
        seconds.append(taken)
    return np.median(seconds[1:], axis=0).T


def refuse_others(logps: Sequence[Sequence[float]]) -> None:
    """Stops where layouts compute different things.

    Args:
      logps: of each of LAYOUTS the mean log-probabilities of chosen and rejected responses.

    Raises:
      UserError: they differ by more than one part in 10,000.
    """
    if not np.allclose(logps, logps[0], rtol=1e-4, atol=0):
        figures = ", ".join(f"{layout} {values}" for layout, values in zip(LAYOUTS, logps, strict=True))
        raise UserError(f"the layouts give different log-probabilities, so nothing is compared: {figures}")
