"""What a step takes on devices that are not here: memory, operations, traffic and time, from its compiled program."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from prefalign_jax import averages
from prefalign_jax.assemble import decoder_of, drawn_dtype, step_of
from prefalign_jax.cost.chips import CHIPS, Chip
from prefalign_jax.cost.collectives import COLLECTIVES, Collective, collectives
from prefalign_jax.cost.flops import count_flops
from prefalign_jax.cost.shapes import SHAPES
from prefalign_jax.data.pipeline import batch_of, make_pair_set
from prefalign_jax.experiment import Experiment, read
from prefalign_jax.models.decoder import DecoderConfig, cast
from prefalign_jax.models.families import from_hf
from prefalign_jax.models.loading import drawn_params
from prefalign_jax.models.lora import Lora, init_adapters
from prefalign_jax.options import choose, given
from prefalign_jax.processes import note
from prefalign_jax.sharding import packing_of, shapes_of, state_shardings, what_stays_whole
from prefalign_jax.tables import aligned
from prefalign_jax.types import Pair, PairLogps, Params, PreferenceBatch, Responses, Sides, TrainState, UserError

GB = 1e9
ROOM = 0.92  # of a device's memory that a program gets: the rest is the runtime's and lost to fragmentation
ATTAINED = 0.4  # of the peak operations, in matrix products
REACHED = 0.7  # of the links' bandwidth, in collectives


class Plan(NamedTuple):
    """A step on a mesh.

    Attributes:
      mesh: devices along each axis.
      memory: bytes on a device by what they hold: parameters, reference, optimizer, average (of a run that keeps one),
        batch, gradients, activations (what the backward pass reads of the layers), temporaries (the rest of what the
        program holds at once).
      flops: of all devices, see `count_flops`.
      traffic: the program's collectives.
      tokens: of the batch, a shared prompt counted once.
    """

    mesh: dict[str, int]
    memory: dict[str, int]
    flops: int
    traffic: list[Collective]
    tokens: int

    @property
    def total(self) -> int:
        """Bytes on a device."""
        return sum(self.memory.values())


def shape_of(name: str) -> DecoderConfig:
    """The shape that a name in SHAPES stands for."""
    choose("model", name, SHAPES)
    return DecoderConfig(**from_hf(SHAPES[name]))


def plan(
    config: ConfigDict, shape: DecoderConfig, mesh: Mesh, *, prompt: int | None = None, response: int | None = None
) -> Plan:
    """Compiles the step of a config for a mesh, of devices that may be simulated, without weights or data.

    Attention is compiled tile by tile. The host's compiler holds in float32 what is bfloat16: activations and what is
    sent of weights and gradients are counted as the bfloat16 that they are; temporaries are an upper bound then.

    Args:
      config: an experiment.
      shape: of the model.
      mesh: of simulated devices.
      prompt, response: tokens of every pair's prompt and of each of its responses; None is half of max_length.

    Returns:
      The `Plan`.

    Raises:
      UserError: a mistake in the config, or adapters that only a file describes.
    """
    config = config.copy_and_resolve_references()
    config.model.attention = "tiles"
    experiment = read(config, complete=False).fitted(shape.max_position)
    config, half = experiment.config, experiment.config.max_length // 2
    prompt, response = prompt or half, response or half
    if config.lora.path:
        raise UserError(
            f"lora.path={config.lora.path!r} is not read; set lora.rank and lora.targets as those adapters have"
        )
    shape = dataclasses.replace(shape, vocab_padding=-shape.vocab_size % config.model.pad_vocabulary)
    full = ("score",) if "reward" in experiment.loss.needs else ()
    lora = Lora(**given(config.lora), full=full) if config.lora.rank else None
    model = decoder_of(config, shape, mesh, lora)
    for sentence in what_stays_whole(mesh, jax.eval_shape(model.init, jax.random.key(0)), model.rules):
        note(sentence)
    optimizer, train_step = step_of(experiment, model, mesh, lambda step: jnp.float32(config.learning_rate))
    state = blank_state(experiment, shape, optimizer, lora)
    batch = blank_batch(experiment, mesh, prompt, response)
    compiled = train_step.lower(state, batch).compile()

    shardings = state_shardings(mesh, state, model.rules)
    text, analysis = compiled.as_text(), compiled.memory_analysis()
    held = held_of(state, shardings)
    held["batch"] = analysis.argument_size_in_bytes - sum(held.values())
    gradients = held["parameters"]
    own = {sharding.shard_shape(x.shape) for x, sharding in _leaves(state, shardings)}
    narrow = config.dtype == "bfloat16"
    activations = _kept(text, shape.num_layers, own) // (2 if narrow else 1)
    rest = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    working = {"gradients": gradients, "activations": activations, "temporaries": rest - gradients - activations}
    if working["temporaries"] < 0:  # the program reuses memory of one for the other
        working["activations"] = max(0, activations + working["temporaries"])
        working["temporaries"] = rest - gradients - working["activations"]
    abstract = shapes_of(state), shapes_of(batch)
    tokens = int(np.prod(batch.weight.shape)) * (prompt + 2 * response)
    flops = count_flops(train_step, *abstract)
    traffic = [_as_bfloat16(one) if narrow else one for one in collectives(text, mesh.size)]
    return Plan(dict(mesh.shape), held | working, flops, traffic, tokens)


def held_of(state: TrainState, shardings: TrainState) -> dict[str, int]:
    """Bytes on a device of the parts of a state."""
    parts = {"parameters": "params", "reference": "reference", "optimizer": "opt_state"}
    parts |= {"average": "ema"} if state.ema is not None else {}
    return {name: _on_device(getattr(state, part), getattr(shardings, part)) for name, part in parts.items()}


def blank_state(experiment: Experiment, shape: DecoderConfig, optimizer: Any, lora: Lora | None) -> TrainState:
    """Shapes and types of the state that a run of the experiment begins with."""
    config, running = experiment.config, experiment.loss.running
    options = dict(dtype=drawn_dtype(config), quantize=config.model.quantize)
    params = jax.eval_shape(lambda: drawn_params(shape, jax.random.key(0), **options))
    reference = None
    if lora:
        base = params if config.model.quantize else jax.eval_shape(lambda tree: cast(tree, config.dtype), params)
        params = jax.eval_shape(lambda tree: init_adapters(jax.random.key(0), tree, lora), base)
        reference = base
    elif config.reference.kind in ("copy", "moving"):
        reference = params
        if config.reference.kind == "copy":
            reference = jax.eval_shape(lambda tree: cast(tree, config.dtype), params)
    carried = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in running} or None
    step = jax.ShapeDtypeStruct((), jnp.int32)
    ema = jax.eval_shape(averages.start, params) if experiment.averaged else None
    return TrainState(step, params, jax.eval_shape(optimizer.init, params), reference, carried, ema)


def blank_batch(experiment: Experiment, mesh: Mesh, prompt: int, response: int) -> PreferenceBatch:
    """Shapes and types of a batch of pairs that all have these lengths."""
    config = experiment.config
    ids = np.zeros(max(prompt, response), np.int32)
    pairs = [Pair(ids[:prompt], ids[:response], ids[:response], scores=(1.0, 0.0))] * config.batch_size
    options = dict(micro_steps=config.micro_steps, layout=experiment.layout, **packing_of(mesh))
    data = make_pair_set(pairs, config.batch_size, row_length=config.data.row_length, **options)
    batch = shapes_of(batch_of(data, np.arange(config.batch_size)))
    if config.reference.kind == "cached":
        pair = jax.ShapeDtypeStruct(batch.weight.shape, jnp.float32)
        sides = {name: Sides(pair, pair) for name in ("shared", "sampled") if name in experiment.loss.needs}
        if "group" in experiment.loss.needs:
            sides["responses"] = Responses(*[shapes_of(batch.scores)] * 4)
        batch = batch._replace(reference=PairLogps(pair, pair, pair, pair, **sides))
    return batch


def _as_bfloat16(one: Collective) -> Collective:
    """A collective at half its size, which is float32's; sums of the head's gradient and token ids stay as they are."""
    of_head = one.kind in ("all-reduce", "reduce-scatter") and "->dv" in one.where
    ids = max(map(len, one.shapes)) < 2 or one.where.endswith("/gather")
    in_float32 = one.size == 4 * sum(map(math.prod, one.shapes))
    return one._replace(size=one.size // 2) if in_float32 and not (of_head or ids) else one


def _leaves(tree: Any, shardings: Any) -> list[tuple[Any, Any]]:
    return list(zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True))


def _on_device(tree: Params | None, shardings: Any) -> int:
    """Bytes of a tree on one device."""
    return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in _leaves(tree, shardings))


def _kept(text: str, layers: int, own: set[tuple[int, ...]]) -> int:
    """Bytes on a device of what the loop over the layers' backward passes reads, parameters and gradients left out."""
    most = 0
    for line in text.splitlines():
        if " while(" not in line or f'known_trip_count":{{"n":"{layers}"' not in line:
            continue
        size = 0
        for kind, dims in re.findall(r"(\w+)\[([\d,]+)\]", line.partition(" while(")[0]):
            shape = tuple(map(int, dims.split(",")))
            if shape[0] == layers and len(shape) > 1 and shape not in own:
                size += math.prod(shape) * int((re.search(r"\d+", kind) or [8])[0]) // 8
        most = max(most, size)
    return most


def seconds(step: Plan, chip: Chip) -> tuple[float, float]:
    """(in matrix products, in collectives) of a step, at ATTAINED and REACHED of the chip's figures."""
    computing = step.flops / math.prod(step.mesh.values()) / (ATTAINED * chip.flops)
    sending = sum(
        one.sent * (one.times or 1) / (REACHED * (chip.link if _in_host(one, chip) else chip.network))
        for one in step.traffic
    )
    return computing, sending


class Duration(NamedTuple):
    """How long something takes: if computing and sending overlap, and if they do not."""

    overlapped: float
    apart: float


def step_time(step: Plan, chip: Chip) -> Duration:
    """Seconds of a step."""
    computing, sending = seconds(step, chip)
    return Duration(max(computing, sending), computing + sending)


def days(step: Plan, config: ConfigDict, chip: Chip, pairs: int) -> tuple[int, Duration]:
    """(steps, days of training without evaluation) of a run on a data set.

    Args:
      step: the plan.
      config: says how many epochs, pairs or steps the run has; one epoch if it says none.
      chip: the device.
      pairs: in the data set.
    """
    steps = read(config, complete=False).total_steps(pairs)
    return steps, Duration(*(steps * one / 86400 for one in step_time(step, chip)))


def _in_host(one: Collective, chip: Chip) -> bool:
    return len({device // chip.host for device in one.group}) == 1


def advice(step: Plan, config: ConfigDict, chip: Chip) -> list[str]:
    """What to change where a step does not fit, and what that leaves of a device's memory; best first."""
    over = step.total - ROOM * chip.memory
    if over <= 0:
        return []
    memory, out = step.memory, []
    in_full = config.lora.rank is None  # all weights are trained

    def offer(saved: float, text: str) -> None:
        if saved > 0.01 * step.total:
            out.append(f"{text}: {(step.total - saved) / GB:.1f} GB a device")

    working = memory["activations"] + memory["temporaries"]
    if config.model.remat != "full":
        offer(memory["activations"] * 0.8, "--config.model.remat=full")
    pairs = config.batch_size // config.micro_steps
    if pairs > math.prod(step.mesh[axis] for axis in ("data", "fsdp")):
        offer(working / 2, f"--config.micro_steps={2 * config.micro_steps}, at least")
    if in_full and config.reference.kind == "copy":
        offer(memory["reference"], "--config.reference.kind=cached")
    if in_full and config.optimizer.name == "adamw":
        offer(memory["optimizer"], "--config.optimizer.name=adafactor, nearly")
    if in_full and config.model.param_dtype == "float32":
        saved = memory["parameters"] / 2 + memory["gradients"] / 2
        offer(saved, "--config.model.param_dtype=bfloat16 --config.model.stochastic_rounding=True")
    if step.mesh["data"] > 1:
        state = memory["parameters"] + memory["reference"] + memory["optimizer"] + memory["gradients"]
        offer(state * (1 - 1 / step.mesh["data"]), "--config.mesh.data=1 --config.mesh.fsdp=-1")
    if in_full:
        offer(memory["optimizer"] + memory["gradients"] + memory["parameters"] / 2, "adapters, --config.lora.rank=16")
    elif config.model.quantize is None:
        offer(0.7 * memory["reference"], "--config.model.quantize=nf4")
    held = sum(memory[name] for name in ("parameters", "reference", "optimizer", "gradients"))
    offer(held / 2, f"{2 * math.prod(step.mesh.values())} devices along fsdp")
    return out


_RATES = ("if both", "s a step", "pairs/s", "tokens/s")


def _axes(step: Plan) -> str:
    return " x ".join(f"{name} {size}" for name, size in step.mesh.items() if size > 1) or "one device"


def _both(took: Duration) -> list[tuple[str, float]]:
    return [("overlap", took.overlapped), ("do not", took.apart)]


def _rates(name: str, step: Plan, config: ConfigDict, took: float) -> tuple[str, ...]:
    return name, f"{took:.2f}", f"{config.batch_size / took:.1f}", f"{step.tokens / took:,.0f}"


def table(steps: Sequence[Plan], config: ConfigDict, chip_name: str, pairs: int | None = None) -> str:
    """Plans of several meshes side by side, each with its rates if computing and sending do not overlap.

    Args:
      steps: the plans.
      config: of all of them.
      chip_name: a key of CHIPS.
      pairs: in a data set, whose days are told too.
    """
    chip, rows = CHIPS[chip_name], []
    for step in steps:
        computing, sending = seconds(step, chip)
        fits = "yes" if step.total <= ROOM * chip.memory else "no"
        sizes = (f"{step.total / GB:.1f}", fits, f"{computing:.2f}", f"{sending:.2f}")
        row = (_axes(step), *sizes, *_rates("", step, config, computing + sending)[1:])
        rows.append((*row, f"{days(step, config, chip, pairs)[1].apart:.3g}") if pairs else row)
    head = ("mesh", "GB a device", "fits", "computing, s", "sending, s", *_RATES[1:], *(["days"] if pairs else []))
    devices = math.prod(steps[0].mesh.values())
    title = f"{devices} {chip_name}; {config.batch_size} pairs a step, {steps[0].tokens} tokens"
    return f"{title}\n\n{aligned(head, rows)}"


def report(step: Plan, config: ConfigDict, chip_name: str, pairs: int | None = None) -> str:
    """The plan as text; with the number of `pairs` in a data set the days of a run too."""
    chip = CHIPS[chip_name]
    devices = math.prod(step.mesh.values())
    lines = [f"{devices} {chip_name}, {_axes(step)}; {config.batch_size} pairs a step, {step.tokens} tokens", ""]
    room = f"of {chip.memory / GB:.0f} GB, {ROOM:.0%} of which a program gets"
    rows = [(name, f"{size / GB:.2f}", "") for name, size in step.memory.items()]
    lines += [aligned(("memory of a device", "GB", ""), [*rows, ("total", f"{step.total / GB:.2f}", room)]), ""]
    rows = []
    for kind in COLLECTIVES:
        of_kind = [one for one in step.traffic if one.kind == kind]
        for near, where in ((True, "in a host"), (False, "between hosts")):
            part = [one for one in of_kind if _in_host(one, chip) == near]
            if part:
                times = sum(one.times or 1 for one in part)
                sent = sum(one.sent * (one.times or 1) for one in part)
                rows.append((f"{kind}, {where}", times, f"{sent / GB:.3f}"))
    lines.append(aligned(("sent by a device a step", "times", "GB"), rows))
    computing, sending = seconds(step, chip)
    lines += ["", f"{step.flops / devices / 1e12:.1f} TFLOP a device, {computing:.2f} s at {ATTAINED:.0%} of the peak"]
    lines += [f"{sending:.2f} s in collectives at {REACHED:.0%} of the links' bandwidth"]
    lines += [aligned(_RATES, [_rates(name, step, config, one) for name, one in _both(step_time(step, chip))])]
    if pairs:
        steps, took = days(step, config, chip, pairs)
        in_days, in_hours = (" to ".join(f"{unit * one:.3g}" for one in took) for unit in (1, 24))
        lines += [f"{pairs:,} pairs, {steps:,} steps: {in_days} days ({in_hours} hours), and evaluation"]
    changes = advice(step, config, chip)
    over = step.total - ROOM * chip.memory
    if over > 0:
        lines += ["", f"It does not fit, by {over / GB:.1f} GB. Each of these by itself would leave:"]
        lines += [f"  {change}" for change in changes]
    else:
        lines += ["", "It fits."]
    return "\n".join(lines)
