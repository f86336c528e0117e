"""Training steps beside a peer's: TRL, Tunix, EasyDeL, or this package with another reference."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.inputs import EOS, FIXED, GROUPS, SHAPES, pairs_for, random_params
from benchmarks.measuring import GIB, PLATFORMS, answer_of
from prefalign_jax.data.rows import content_digest
from prefalign_jax.files import whole, write_json
from prefalign_jax.models import families, hf_io
from prefalign_jax.models.decoder import REMAT
from prefalign_jax.options import choose
from prefalign_jax.types import UserError

SIDES = Path(__file__).parent / "sides"
REFERENCES = ("copy", "cached")
OURS = (*REFERENCES, "separate", "none")  # peers that are this package itself, or nobody
SCRIPTS = {name: f"{name}_side.py" for name in ("trl", "tunix", "easydel")} | dict.fromkeys(OURS, "our_side.py")


def train(
    *,
    peer: str = "trl",
    python: str = sys.executable,
    loss: str = "dpo",
    shape: str = "smollm2-135m",
    lengths: str = "128+128",
    pairs: int = 4,
    max_length: int = 512,
    steps: int = 3,
    rounds: int = 2,
    dtype: str = "float32",
    param_dtype: str = "float32",
    lora: int = 0,
    remat: str = "none",
    peer_remat: str = "none",
    attention: str = "tiles",
    peer_head: str = "whole",
    reference: str = "copy",
    device: str = "cpu",
    learning_rate: float = 1e-6,
    keep: str = "",
) -> dict[str, Any]:
    """Training steps beside a peer's in turn: the same weights, pairs, precision and optimizer, in separate processes.

    Args:
      peer: trl, tunix, easydel, or ours with another reference, cached or copy, or with every pair by itself: separate,
        or without a peer: none.
      python: the interpreter of the peer's environment; see docs/performance.md.
      loss: dpo or orpo.
      shape: of the model, a key of SHAPES; its weights are random.
      lengths: P+R, tokens of every prompt and response, or P+RxK, medians of those of groups of K responses, of which
        all pairs are taken and share their tokens, or a file of preference pairs, whose text is tokenized by a
        byte-level BPE trained on it, as large as the model's vocabulary.
      pairs: in a batch.
      max_length: longer pairs of a file are left out.
      steps: of each process; the first and those that compile are not counted.
      rounds: processes of each side.
      dtype, param_dtype: of the computation and of the weights.
      lora: rank of adapters, 0 trains all weights.
      remat, peer_remat: what our backward pass keeps, and whether the peer's recomputes activations: none or full.
      attention: of our decoder: tiles or cudnn.
      peer_head: whole leaves TRL as it is; fused sets its use_liger_kernel, which needs liger-kernel and a GPU. Despite
        the name it adds Liger's kernels for layers alone: TRL 1.16's DPO computes its head in tiles either way, and on
        trained tokens only.
      reference: copy, or cached: our log-probabilities of the reference, computed before.
      device: cpu or gpu; this process itself computes on the CPU.
      learning_rate: of AdamW without weight decay, constant.
      keep: directory to make the weights and pairs in, or where an earlier run made them; none is a temporary one.

    Returns:
      What was measured, medians over all steps that count.

    Raises:
      UserError: a side failed, compiled in every step, or computes another thing: see `refuse_others`.
    """
    refuse_options(**locals())
    with contextlib.ExitStack() as stack:
        scratch = Path(keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-")))
        model, data = write_inputs(scratch, shape, dtype, lengths, pairs, steps, max_length)
        spec = dict(model=str(model), pairs=str(data), loss=loss, size=pairs, steps=steps, max_length=max_length)
        spec |= dict(dtype=dtype, param_dtype=param_dtype, lora=lora, learning_rate=learning_rate, eos=EOS)
        spec |= dict(vocabulary=SHAPES[shape].vocab_size, threads=len(os.sched_getaffinity(0)))
        spec |= dict(attention=attention, head=peer_head)
        ours = spec | dict(remat=remat, reference=reference, group=bool(GROUPS.fullmatch(lengths)))
        theirs = spec | dict(remat=peer_remat, reference=peer if peer in REFERENCES else reference)
        theirs["group"] = ours["group"] and peer != "separate"
        turns: list[dict[str, dict[str, Any]]] = []
        for number in range(rounds):
            turn = {"ours": side(sys.executable, "our_side.py", ours, device)}
            if peer != "none":
                turn[peer] = side(python, SCRIPTS[peer], theirs, device)
                refuse_others(turn, dtype)
                print(f"round {number + 1}: {ratio_of(turn, peer):.2f}", file=sys.stderr)
            turns.append(turn)
    return comparison(turns, peer, pairs)


def refuse_options(
    *,
    peer: str,
    python: str,
    loss: str,
    shape: str,
    lengths: str,
    pairs: int,
    max_length: int,
    steps: int,
    rounds: int,
    dtype: str,
    param_dtype: str,
    lora: int,
    peer_remat: str,
    peer_head: str,
    reference: str,
    device: str,
    **others: Any,
) -> None:
    """Checks the options of `train`.

    Raises:
      UserError: one is unknown, or they do not fit together.
    """
    choose("--shape", shape, SHAPES)
    choose("--loss", loss, dict.fromkeys(("dpo", "orpo")))
    choose("--device", device, PLATFORMS)
    choose("--peer", peer, SCRIPTS)
    choose("--peer_head", peer_head, dict.fromkeys(("whole", "fused")))
    if peer_head == "fused" and (peer != "trl" or device != "gpu" or loss != "dpo"):
        raise UserError("--peer_head=fused is for --peer=trl --loss=dpo --device=gpu")
    if min(pairs, rounds, steps - 1, max_length) < 1:
        raise UserError("--pairs, --rounds and --max_length must be positive, --steps at least 2")
    choose("--reference", reference, dict.fromkeys(REFERENCES))
    choose("--peer_remat", peer_remat, REMAT if peer in OURS else dict.fromkeys(("none", "full")))
    if reference == "cached" and peer not in OURS:
        raise UserError("--reference=cached leaves out a pass that the peer makes; compare it with --peer=copy or none")
    if peer == "separate" and not GROUPS.fullmatch(lengths):
        raise UserError("--peer=separate is for pairs of groups; write --lengths=P+RxK")
    if python != sys.executable and peer in OURS:
        raise UserError(f"--python is the peer's, and --peer={peer} runs in this environment")
    if loss == "orpo" and (reference == "cached" or peer in REFERENCES):
        raise UserError("--loss=orpo has no reference that could be cached; compare it with --peer=trl")
    losses = {"tunix": ("dpo",), "easydel": ("dpo", "orpo")}
    if peer in losses and (loss not in losses[peer] or lora or (dtype, param_dtype) != ("float32", "float32")):
        raise UserError(f"--peer={peer} is measured with --loss={' or '.join(losses[peer])}, all weights and float32")


def write_inputs(
    scratch: Path,
    shape: str,
    dtype: str,
    lengths: str,
    pairs: int,
    steps: int,
    max_length: int,
    *,
    weights: bool = True,
) -> tuple[Path, Path]:
    """(directory of the model, file of the pairs), made unless they are there; without weights it has a shape alone."""
    config, drawn_from = SHAPES[shape], lengths
    if not (FIXED.fullmatch(lengths) or GROUPS.fullmatch(lengths)):
        drawn_from = f"{Path(lengths).name}-{content_digest(lengths)[:8]}"
    model = scratch / (f"{shape}-{dtype}" if weights else f"{shape}-shape")
    data = scratch / f"{pairs}x{steps}-{max_length}-{config.vocab_size}-{drawn_from}.json"
    if not weights:
        write_json(model / "config.json", families.to_hf(config))
    elif not model.exists():
        hf_io.save_params(random_params(config, dtype), config, model, dtype=dtype)
    if not data.exists():
        drawn = json.dumps(pairs_for(lengths, config.vocab_size, pairs, steps, max_length))
        with whole(data) as part:
            part.write_text(drawn)
    return model, data


def refuse_others(turn: dict[str, dict[str, Any]], dtype: str) -> None:
    """Stops where two sides compute different things.

    DPO's first loss is log 2 whatever the weights and the pairs: the log-probabilities are not. The second differs
    by what bfloat16 rounds in a step of the update.

    Raises:
      UserError: the first losses differ by more than 1e-3, the second ones (in bfloat16 by ten times that), or the
        mean log-probability of the first batch's chosen responses by more than 1; or one side used the CPU alone.
    """
    devices = {name: one["device"] for name, one in turn.items()}
    if len({device == "cpu" for device in devices.values()}) > 1:
        raise UserError(f"the sides used different devices, so nothing is compared: {devices}")
    seen = [[*one["losses"][:2], one["chosen_logps"]] for one in turn.values()]
    if not (np.abs(np.subtract(*seen)) <= [1e-3, 1e-3 if dtype == "float32" else 1e-2, 1.0]).all():
        figures = (f"{name} {x['losses'][:2]} at {x['chosen_logps']}" for name, x in turn.items())
        raise UserError(f"the first losses differ, so nothing is compared: {', '.join(figures)}")


def warm(one: dict[str, Any], name: str) -> np.ndarray:
    """A side's figures of the steps that count: not the first, and none that compiled."""
    cold = one.get("cold", [False] * len(one["seconds"]))
    counts = [number > 0 and not cold for number, cold in enumerate(cold)]
    if not any(counts):
        raise UserError("every step compiled a program, so none counts; write more --steps")
    return np.array(one[name])[counts]


def ratio_of(turn: dict[str, dict[str, Any]], peer: str) -> float:
    """The peer's time for a step over ours, by the medians of one round."""
    return float(np.median(warm(turn[peer], "seconds")) / np.median(warm(turn["ours"], "seconds")))


def times_of(results: Sequence[dict[str, Any]], pairs: int) -> dict[str, float]:
    """Times and memory of a side's steps, over all rounds."""
    seconds = np.concatenate([warm(one, "seconds") for one in results])
    return {
        "steps": len(seconds),
        "s a step": float(np.median(seconds)),
        "s a step, least": float(seconds.min()),
        "s a step, most": float(seconds.max()),
        "CPU-s a step": float(np.median(np.concatenate([warm(one, "cpu_seconds") for one in results]))),
        "pairs/s": pairs / float(np.median(seconds)),
        "peak memory, GiB": max(one["peak_bytes"] for one in results) / GIB,
        "first step, s": float(np.median([one["seconds"][0] for one in results])),
    }


def counts_of(ours: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What our side knows besides: tokens, padding, programs, and operations on useful tokens."""
    names = ("tokens", "positions", "trained", "wait_seconds", "useful_flops", "seconds")
    counted = {name: np.concatenate([warm(one, name) for one in ours]) for name in names}
    useful = counted["useful_flops"] / counted["seconds"]
    return {
        "trained tokens/s": float(counted["trained"].sum() / counted["seconds"].sum()),
        "padding, share of positions": float(1 - counted["tokens"].sum() / counted["positions"].sum()),
        "input wait, share of time": float(counted["wait_seconds"].sum() / counted["seconds"].sum()),
        "programs compiled": max(one["programs"] for one in ours),
        "compilation, s": float(np.median([one["compile_seconds"] for one in ours])),
        "GFLOP/s on useful tokens": float(np.median(useful) / 1e9),
        "share of this machine's matmul rate": float(np.median(useful) / np.median([x["matmul_flops"] for x in ours])),
    }


def comparison(turns: Sequence[dict[str, dict[str, Any]]], peer: str, pairs: int) -> dict[str, Any]:
    """The figures of `train` from what the sides measured in each round."""
    figures: dict[str, Any] = {"device": turns[0]["ours"]["device"]}
    for name in turns[0]:
        times = times_of([turn[name] for turn in turns], pairs)
        figures |= {f"{name}, {key}": value for key, value in times.items()}
    figures |= {f"ours, {key}": value for key, value in counts_of([turn["ours"] for turn in turns]).items()}
    if peer == "none":
        return figures
    rounds = [ratio_of(turn, peer) for turn in turns]
    apart = [np.abs(np.subtract(turn["ours"]["losses"], turn[peer]["losses"])).max() for turn in turns]
    return figures | {
        "times as fast, each round": ", ".join(f"{ratio:.2f}" for ratio in rounds),
        "times as fast": float(np.median(rounds)),
        "memory, ours over theirs": figures["ours, peak memory, GiB"] / figures[f"{peer}, peak memory, GiB"],
        "largest difference of a loss": float(max(apart)),
        "peer's versions": ", ".join(f"{name} {version}" for name, version in turns[0][peer]["versions"].items()),
    }


def side(python: str, script: str, spec: dict[str, Any], device: str, **limits: Any) -> dict[str, Any]:
    """Runs one side in a process of its own; what it measured.

    Args:
      python: the interpreter.
      script: in the folder `sides`.
      spec: what it reads.
      device: cpu or gpu.
      **limits: seconds and cache of `answer_of`.

    Raises:
      UserError: it failed.
    """
    others = script in {name for peer, name in SCRIPTS.items() if peer not in OURS}
    return answer_of([python, str(SIDES / script), json.dumps(spec)], device, apart=others, **limits)
