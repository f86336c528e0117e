"""All that is to be measured on a GPU, most valuable first, each row written as soon as it is done.

DIR/rows.jsonl has a record for each row, DIR/rows.md the same as tables. Both appear whole or not at all, so a cut at
any second loses no more than the row under way. The same command goes on with the rows that are missing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.inputs import EOS, SHAPES
from benchmarks.measuring import PLATFORMS, answer_of
from benchmarks.members import of_members
from benchmarks.peers import counts_of, ratio_of, refuse_others, side, times_of, warm, write_inputs
from prefalign_jax.cost.chips import CHIPS
from prefalign_jax.files import locked, read_json_lines, remove_parts, write_text
from prefalign_jax.models.decoder_config import DecoderConfig
from prefalign_jax.options import choose
from prefalign_jax.processes import note
from prefalign_jax.tables import markdown
from prefalign_jax.types import UserError

ROUNDS = 3  # of the rows beside TRL
MAX_LENGTH = 512


class Sizes(NamedTuple):
    """How much is computed: for a GPU, or small enough for a test on a CPU."""

    shape: str
    large: str  # of the row with adapters
    little: str  # of the row of members
    pairs: int
    steps: int
    members: int
    rows: tuple[int, ...]  # of decoding
    prompt: int
    new_tokens: int


FULL = Sizes("smollm2-1.7b", "llama-7b", "smollm2-135m", 16, 8, 8, (1, 64), 128, 128)
SMALL = Sizes("tiny", "tiny", "tiny", 2, 3, 2, (1, 2), 4, 4)


class Setting(NamedTuple):
    """What decides the figures beside the machine: the rows of a directory have it in common."""

    small: bool
    device: str
    lengths: str

    @property
    def sizes(self) -> Sizes:
        """The sizes."""
        return SMALL if self.small else FULL


Limits = Callable[[], dict[str, Any]]  # -> seconds that are left, and the other options of `answer_of`


class Row(NamedTuple):
    """A row of the tables.

    Attributes:
      name: of it alone.
      kind: a key of FIGURES.
      seconds: it takes on an H200, with the start of its processes and compilation.
      measure: what its process measured.
      beside: of a row that computes the same.
    """

    name: str
    kind: str
    seconds: float
    measure: Callable[[Limits], dict[str, Any]]
    beside: str | None = None


class Skipped(UserError):
    """A row that this machine cannot have."""


def gpu(
    *,
    minutes: float = 12.0,
    small: bool = False,
    device: str = "gpu",
    lengths: str = "127+59x2",
    python: str = sys.executable,
    keep: str = "",
    out: str = "",
) -> dict[str, Any]:
    """All that is to be measured on a GPU, most valuable first, each row written to --out=DIR as soon as it is done.

    It needs no network. Run again with the same --out it goes on with what is missing, then tries again what failed.

    Args:
      minutes: no row is begun that needs more than what is left of them, and none goes on after them.
      small: tiny models, to try the way on a CPU; the figures mean nothing.
      device: gpu or cpu.
      lengths: as `train` takes them; P+Rx2 draws pairs of these medians. The default has those of HH-RLHF.
      python: the interpreter of TRL's environment; without torch and trl in it TRL's rows are skipped.
      keep: directory of weights, pairs and compiled programs, 4 GB; none is DIR/inputs.
      out: DIR.

    Returns:
      For each row its figures, or why it has none.

    Raises:
      UserError: a mistake in the options, DIR holds rows of other options or is in use, or there is no such device.
    """
    choose("--device", device, PLATFORMS)
    if minutes <= 0:
        raise UserError(f"--minutes={minutes:g} must be positive")
    if device == "cpu" and not small:
        raise UserError("--device=cpu is for --small")
    jax.config.update("jax_platforms", "cpu")  # the device is for the processes that measure
    ends, directory = time.monotonic() + 60 * minutes, Path(out)
    setting, kept = Setting(small, device, lengths), Path(keep or directory / "inputs")

    def limits() -> dict[str, Any]:
        return dict(seconds=max(ends - time.monotonic(), 0.1), cache=kept / "programs")

    with locked(directory, "--out"):
        remove_parts(kept)
        records = read_rows(directory, setting)
        for row in missing_first(rows_of(setting, python, kept), records):
            left = ends - time.monotonic()
            record = {"row": row.name, "kind": row.kind, "estimate": row.seconds, "setting": setting._asdict()}
            if left >= row.seconds:
                record |= measured_by(row, records, setting, limits)
            elif records.get(row.name, {}).get("status") == "failed":
                continue  # which says more
            else:
                why = f"{max(left, 0):.0f} s were left, about {row.seconds:.0f} are needed"
                record |= {"status": "not started", "why": why}
            records[row.name] = record
            write_rows(directory, records, setting)
            note(f"{row.name}: {record.get('why') or record['status']}")
            if row.kind == "rate" and record["status"] == "failed":
                raise UserError(f"nothing can be measured with --device={device}: {record['why']}")
    return {name: one.get("why") or summary(one) for name, one in records.items()}


def measured_by(row: Row, records: Mapping[str, Any], setting: Setting, limits: Limits) -> dict[str, Any]:
    """What is to be recorded of a row: status, seconds it took, and what it measured or why it did not."""
    began = time.monotonic()

    def ended(status: str, **more: Any) -> dict[str, Any]:
        return {"status": status, "seconds": time.monotonic() - began, **more}

    try:
        measured = row.measure(limits)
        other = records.get(row.beside, {})
        if other.get("status") == "measured":
            refuse_others({row.beside: other["measured"], row.name: measured}, "bfloat16")
        figures = FIGURES[row.kind](measured, setting.sizes)
    except subprocess.TimeoutExpired:
        return ended("cut", why="the minutes were over before it was done")
    except UserError as error:
        return ended("skipped" if isinstance(error, Skipped) else "failed", why=str(error))
    return ended("measured", figures=figures, measured=measured)


def missing_first(rows: Sequence[Row], records: Mapping[str, Any]) -> list[Row]:
    """The rows that are not measured yet, those that failed before last."""
    statuses = {row.name: records.get(row.name, {}).get("status") for row in rows}
    rest = [row for row in rows if statuses[row.name] != "measured"]
    return sorted(rest, key=lambda row: statuses[row.name] == "failed")


# Rows


def rows_of(setting: Setting, python: str, keep: Path) -> list[Row]:
    """All rows, in the order of their value: each thing once, then the further rounds beside TRL."""
    sizes, device = setting.sizes, setting.device

    def inputs(shape: str, weights: bool) -> tuple[str, str]:
        made = write_inputs(
            keep, shape, "bfloat16", setting.lengths, sizes.pairs, sizes.steps, MAX_LENGTH, weights=weights
        )
        return tuple(map(str, made))

    def steps(
        who: str, *, shape: str = sizes.shape, weights: bool = True, again: bool = False, **changes: Any
    ) -> Callable[..., Any]:
        """Training steps, ours or TRL's, which computes the same. To repeat ours is of use beside TRL's alone."""

        def measure(limits: Limits) -> dict[str, Any]:
            if (who == "trl" or again) and (absent := not_installed(python)):
                raise Skipped(f"{python} lacks {' and '.join(absent)}; name another by --python")
            model, data = inputs(shape, weights)
            config = SHAPES[shape]
            spec = dict(model=model, pairs=data, drawn=not weights, loss="dpo", size=sizes.pairs, steps=sizes.steps)
            spec |= dict(max_length=MAX_LENGTH, dtype="bfloat16", param_dtype="float32", lora=0, learning_rate=1e-6)
            spec |= dict(eos=EOS, vocabulary=config.vocab_size, threads=len(os.sched_getaffinity(0)))
            spec |= dict(attention="tiles", head="whole", remat="none", reference="copy", group=False, one_program=True)
            spec |= changes
            programs = [sys.executable, "our_side.py"] if who == "ours" else [python, "trl_side.py"]
            measured = side(*programs, spec, device, **limits())
            if not spec["lora"]:  # adapters have no gradients of kernels, which open-instruct would count
                measured["text_flops"] = text_flops(config, data, sizes)
            return measured

        return measure

    def other(script: str, **spec: Any) -> Callable[..., Any]:
        def measure(limits: Limits) -> dict[str, Any]:
            if "shape" in spec:
                spec["model"], spec["pairs"] = inputs(spec["shape"], weights=False)
            return side(sys.executable, script, dict(dtype="bfloat16") | spec, device, **limits())

        return measure

    def decoding(limits: Limits) -> dict[str, Any]:
        model, _ = inputs(sizes.shape, weights=True)
        options = dict(directory=model, who="ours", prompt=sizes.prompt, new_tokens=sizes.new_tokens, dtype="bfloat16")
        options["cores"], measured = len(os.sched_getaffinity(0)), {}
        for rows in sizes.rows:
            words = ["benchmarks.measuring", "decoding.decode_step", json.dumps(options | {"rows": rows})]
            one = answer_of([sys.executable, "-P", "-m", *words], device, **limits())
            measured[str(rows)] = {"seconds": one["seconds"], "first": one["first"]}
        return measured

    def beside(number: int) -> list[Row]:
        """A round of both losses, of which the first has our DPO already."""
        word = f", round {number}" if number > 1 else ""
        ours = {loss: f"{loss.upper()}, tiles{word}" for loss in ("dpo", "orpo")}
        rows = []
        for loss, name in ours.items():
            rows.append(Row(name, "train", 60, steps("ours", loss=loss, again=number > 1)))
            rows.append(Row(f"{loss.upper()}, TRL{word}", "peer", 80, steps("trl", loss=loss), name))
        return rows

    tiles, *first = beside(1)
    many = dict(
        shape=sizes.little, members=sizes.members, lora=0, size=sizes.pairs // 2, steps=sizes.steps, learning_rate=1e-6
    )
    rows = [
        Row("products of 8192 x 8192, eight in a row", "rate", 20, other("jax_device.py")),
        tiles,
        Row("DPO, cuDNN", "train", 60, steps("ours", attention="cudnn"), tiles.name),
        *first,
        Row(
            f"DPO with adapters, {sizes.large}",
            "train",
            90,
            steps("ours", shape=sizes.large, weights=False, lora=16, param_dtype="bfloat16"),
        ),
        Row("DPO, tiles, weights in bfloat16", "train", 60, steps("ours", param_dtype="bfloat16")),
        Row(f"{sizes.members} members of {sizes.little}", "members", 60, other("members_side.py", **many)),
        Row(f"decoding, {sizes.shape}", "decode", 60, decoding),
        *(row for number in range(2, ROUNDS + 1) for row in beside(number)),
    ]
    return [row._replace(seconds=1.0) for row in rows] if setting.small else rows


def not_installed(python: str) -> list[str]:
    """Which of TRL's packages an interpreter lacks.

    Raises:
      UserError: there is no such interpreter.
    """
    code = "import importlib.util as u; print(*(x for x in ('torch', 'trl') if u.find_spec(x) is None))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"--python={python} does not run: {error}") from None
    return done.stdout.split()


def text_flops(config: DecoderConfig, data: str, sizes: Sizes) -> list[float]:
    """`as_open_instruct` of every step."""
    sides = json.loads(Path(data).read_text())
    prompt, *responses = (np.array([len(ids) for ids in sides[name]]) for name in ("prompt", "chosen", "rejected"))
    texts = np.stack([prompt + response for response in responses], axis=1)[: sizes.steps * sizes.pairs]
    return [as_open_instruct(config, batch.ravel()) for batch in texts.reshape(sizes.steps, -1)]


def as_open_instruct(config: DecoderConfig, lengths: Sequence[int]) -> float:
    """Operations of a training step by the convention of open-instruct, whose published share of the peak it underlies.

    A prompt counts with each of its responses, and every text as one of the mean length. A step is three forward
    passes. The reference's is left out, as it is computed before. All L^2 scores count, with 4 operations of the
    softmax each, and the head at every token.

    Args:
      config: of a gated decoder.
      lengths: tokens of each text.

    Returns:
      The count.
    """
    c, length = config, int(np.mean(lengths))
    width, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    products = 2 * length * c.hidden_size * (2 * width + 2 * kv + 3 * c.intermediate_size)
    scores = c.num_heads * length**2 * (4 * c.head_dim + 4)
    layer = products + scores + length * c.intermediate_size
    return 3.0 * len(lengths) * (c.num_layers * layer + 2 * length * c.hidden_size * c.vocab_size)


# Figures: (what a process measured, the sizes) -> {name: number or text}


def of_training(measured: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Of our steps or TRL's; the shares of the peak are None for a chip that `cost.chips` does not list."""
    figures: dict[str, Any] = {"device": measured["device"], **times_of([measured], sizes.pairs)}
    seconds = warm(measured, "seconds")
    peak = next((chip.flops for name, chip in CHIPS.items() if name in measured["device"].lower()), None)

    def share(flops: str) -> float | None:
        if peak is None or flops not in measured:
            return None
        return float(np.median(warm(measured, flops) / seconds)) / peak

    if "useful_flops" in measured:
        figures |= counts_of([measured])
    return figures | {"MFU, prompts once": share("useful_flops"), "MFU, as open-instruct": share("text_flops")}


def of_decoding(measured: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """New tokens a second, by the median of three runs."""
    rates = {rows: int(rows) * sizes.new_tokens / float(np.median(one["seconds"])) for rows, one in measured.items()}
    return {f"tokens/s, {rows} rows": rate for rows, rate in rates.items()}


def of_products(measured: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """The rate that shares are taken of."""
    return {"device": measured["device"], "TFLOP/s": measured["matmul_flops"] / 1e12}


FIGURES: dict[str, Callable[[Mapping[str, Any], Sizes], dict[str, Any]]] = {
    "train": of_training,
    "peer": of_training,
    "members": lambda measured, sizes: of_members(measured, sizes.members),
    "decode": of_decoding,
    "rate": of_products,
}


# Files


def read_rows(directory: Path, setting: Setting) -> dict[str, dict[str, Any]]:
    """The records of earlier calls, by row.

    Raises:
      UserError: they are of another setting.
    """
    records = read_json_lines(
        directory / "rows.jsonl", {"row": "a string", "status": "a string", "setting": "an object"}
    )
    for record in records:
        if record["setting"] != setting._asdict():
            raise UserError(f"--out={directory} holds rows of {record['setting']}; name another directory")
    return {record["row"]: record for record in records}


def write_rows(directory: Path, records: Mapping[str, dict[str, Any]], setting: Setting) -> None:
    """Both files."""
    write_text(directory / "rows.jsonl", "".join(json.dumps(record) + "\n" for record in records.values()))
    write_text(directory / "rows.md", page(records, setting))


def summary(record: Mapping[str, Any]) -> str:
    """The figures of a row in one line."""
    figures = record["figures"]
    return ", ".join(f"{name} {_shown(value)}" for name, value in figures.items() if name != "device")


def _shown(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def page(records: Mapping[str, dict[str, Any]], setting: Setting) -> str:
    """The tables."""
    done = {name: record for name, record in records.items() if record["status"] == "measured"}
    sizes = setting.sizes
    device = next((one["figures"]["device"] for one in done.values() if "device" in one["figures"]), "no device")
    pairs = f"{sizes.pairs} pairs of {setting.lengths}, {sizes.shape} unless another is named, bfloat16"
    parts = [f"# On {device}\n\n{pairs}, jax {version('jax')}."]
    if setting.small:
        parts.append("A trial at small size: the figures mean nothing.")
    training = [name for name, record in done.items() if record["kind"] in ("train", "peer")]
    head = (
        "row",
        "s a step (least to most)",
        "pairs/s",
        "peak memory, GiB",
        "useful TFLOP/s",
        "share of the products' rate",
    )
    head += ("MFU, prompts once", "MFU, as open-instruct")
    if training:
        parts.append(markdown(head, [_line(name, done[name]["figures"]) for name in training]))
    parts.append(CONVENTIONS.strip())
    if lines := compared(done):
        head = ("compared", "times as fast, each round", "median", "memory", "largest difference of a loss")
        parts.append(markdown(head, lines))
    others = [(name, summary(record)) for name, record in done.items() if name not in training]
    if others:
        parts.append(markdown(("row", "figures"), others))
    rest = [(name, one["status"], one["why"]) for name, one in records.items() if name not in done]
    if rest:
        parts.append(markdown(("row", "status", "why"), rest))
    return "\n\n".join(parts) + "\n"


CONVENTIONS = """
MFU is the share of the chip's dense bfloat16 peak. "Prompts once" counts each token of the packed trees
once, the reference's pass, and the head on trained tokens. It leaves out attention. "As open-instruct" counts every
prompt with each response, all scores, and the head at every token. It leaves out the reference's pass."""


def _line(name: str, figures: Mapping[str, Any]) -> list[str]:
    seconds = " ".join(
        [_shown(figures["s a step"]), f"({_shown(figures['s a step, least'])} to {_shown(figures['s a step, most'])})"]
    )
    useful = figures.get("GFLOP/s on useful tokens")
    shares = ("share of this machine's matmul rate", "MFU, prompts once", "MFU, as open-instruct")
    plain = [figures["pairs/s"], figures["peak memory, GiB"], useful and useful / 1000, *map(figures.get, shares)]
    return [name, seconds, *map(_shown, plain)]


def compared(done: Mapping[str, dict[str, Any]]) -> list[list[str]]:
    """Rows beside others of the same round, a line for each comparison that can be made."""
    rounds = ["", *(f", round {number}" for number in range(2, ROUNDS + 1))]
    comparisons = {
        f"{loss}, tiles, beside TRL": [(f"{loss}, tiles{word}", f"{loss}, TRL{word}") for word in rounds]
        for loss in ("DPO", "ORPO")
    }
    comparisons["DPO, cuDNN, beside tiles"] = [("DPO, cuDNN", "DPO, tiles")]
    comparisons["weights in bfloat16, beside float32"] = [("DPO, tiles, weights in bfloat16", "DPO, tiles")]
    lines = []
    for title, names in comparisons.items():
        turns = [[done[name]["measured"] for name in two] for two in names if done.keys() >= {*two}]
        if turns:
            ratios = [ratio_of({"ours": one, "other": other}, "other") for one, other in turns]
            memory = np.median([one["peak_bytes"] / other["peak_bytes"] for one, other in turns])
            apart = max(np.abs(np.subtract(one["losses"], other["losses"])).max() for one, other in turns)
            each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            lines.append([title, each, f"{np.median(ratios):.2f}", f"{memory:.2f}", f"{apart:.1e}"])
    return lines
