"""Measures a part of the package: python scripts/benchmark.py import --params=1e9 --dtype=stored --out=FILE.json.

Prints a small table and writes it as JSON, with the options and the versions that made it.
"""

import contextlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import tokenizers
import transformers
from safetensors.numpy import save_file

import prefalign_jax
from prefalign_jax import cli
from prefalign_jax.config import defaults
from prefalign_jax.cost.flops import count_flops
from prefalign_jax.data.chat import load_tokenizer
from prefalign_jax.data.packing import Layout, lengths_of
from prefalign_jax.data.pipeline import balanced, batch_of, make_pair_set, train_batches
from prefalign_jax.data.records import read_records
from prefalign_jax.data.rows import content_digest
from prefalign_jax.experiment import read
from prefalign_jax.files import whole, write_json
from prefalign_jax.generation.generate import sample
from prefalign_jax.generation.sampling import Sampling
from prefalign_jax.load_data import load_pairs
from prefalign_jax.losses import make_loss
from prefalign_jax.models import families, hf_io
from prefalign_jax.models.decoder import REMAT, DecoderConfig, make_decoder
from prefalign_jax.models.lora import Lora, init_adapters
from prefalign_jax.models.quantize import quantize_params
from prefalign_jax.options import choose, hyper_parameters
from prefalign_jax.sharding import make_mesh, param_shardings, shapes_of
from prefalign_jax.tables import aligned
from prefalign_jax.train_step import init_state, make_train_step
from prefalign_jax.types import Pair, TrainState, UserError

GIB = 2**30


def import_(
    *, params: float = 1e9, dtype: str = "stored", quantize: str = "none", devices: int = 1, keep: str = ""
) -> dict[str, Any]:
    """A bfloat16 checkpoint in several files -> parameters on their devices, by hf_io.load_params in a fresh process.

    Args:
      params: about how many parameters the model has.
      dtype: of the parameters: stored, float32 or bfloat16.
      quantize: none, int8 or nf4.
      devices: along the mesh's axis fsdp; on a CPU that many are simulated.
      keep: directory to make the checkpoint in, or where an earlier run made it; none is a temporary one.

    Returns:
      What was measured. Anonymous memory is what the process allocated; where the device's memory is the host's, the
      parameters are taken off its peak. File-backed memory is mapped from the files, and free for others to take.
    """
    choose("--dtype", dtype, dict.fromkeys(("stored", "float32", "bfloat16")))
    choose("--quantize", quantize, dict.fromkeys(("none", "int8", "nf4")))
    if params <= 0 or devices < 1:
        raise UserError(f"--params={params:g} and --devices={devices} must be positive")
    with contextlib.ExitStack() as stack:
        directory = Path(keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="checkpoint-")))
        config = shape_of(params)
        tensors = dict(llama_tensors(config))
        write_checkpoint(directory, config, tensors)
        found, anonymous, mapped = measured(
            "load", directory=str(directory), dtype=dtype, quantize=quantize, devices=devices
        )
    sizes = [2 * int(np.prod(shape)) for shape in tensors.values()]
    beyond = anonymous - (found["parameter bytes"] if found["device"] == "cpu" else 0)
    return {
        "device": found["device"],
        "parameters, millions": sum(sizes) / 2e6,
        "seconds": found["seconds"],
        "GiB/s of files": sum(sizes) / GIB / found["seconds"],
        "parameters, GiB": found["parameter bytes"] / GIB,
        "largest tensor, GiB": max(sizes) / GIB,
        "peak anonymous memory beyond the parameters, GiB": beyond / GIB,
        "anonymous memory before, GiB": found["anonymous before"] / GIB,
        "peak file-backed memory, GiB": mapped / GIB,
        "beyond <= largest tensor + 1 GiB": beyond <= max(sizes) + GIB,
    }


def decode(
    *, model: str = "", rows: str = "1,32", prompt: int = 32, new_tokens: int = 64, rounds: int = 2, cores: int = 1
) -> dict[str, Any]:
    """Greedy generation beside transformers' on PyTorch: float32, the same weights, prompts and numbers of tokens.

    The two take turns, each time in a fresh process, which runs once unmeasured, for compilation, and then three times.

    Args:
      model: a Hugging Face directory; none is random weights in the shape of SmolLM2-135M.
      rows: batch sizes.
      prompt, new_tokens: of every row; nothing stops before.
      rounds: processes of each.
      cores: that either may use, as many threads as cores. More than are idle make the two wait in different ways, and
        what is measured then is the waiting.

    Returns:
      For each batch size the medians in new tokens a second, their ratio, and how many tokens are the same.
    """
    if min(prompt, new_tokens, rounds, cores, *map(int, rows.split(","))) < 1:
        raise UserError("--rows, --prompt, --new_tokens, --rounds and --cores must be positive")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as scratch:
        directory = model or str(Path(scratch) / "random")
        if not model:
            config = DecoderConfig(49152, 576, 1536, 30, num_heads=9, num_kv_heads=3, head_dim=64, tie_embeddings=True)
            hf_io.save_params(make_decoder(config).init(jax.random.key(0)), config, directory)
        for count in map(int, rows.split(",")):
            turns: dict[str, list[dict[str, Any]]] = {"ours": [], "transformers": []}
            for _ in range(rounds):
                for who, results in turns.items():
                    options = dict(directory=directory, rows=count, prompt=prompt, new_tokens=new_tokens, cores=cores)
                    results.append(measured("decode_side", who=who, devices=1, **options)[0])
            rates = {
                who: count * new_tokens / float(np.median([s for one in results for s in one["seconds"]]))
                for who, results in turns.items()
            }
            found |= {f"{who}, {count} rows, tokens/s": rate for who, rate in rates.items()}
            found[f"ratio, {count} rows"] = rates["ours"] / rates["transformers"]
            tokens = (np.array(results[0]["tokens"]) for results in turns.values())
            found[f"same tokens, {count} rows"] = float(np.mean(np.equal(*tokens)))
            found[f"ours, {count} rows, first run with compilation, s"] = turns["ours"][0]["first"]
    return found


SHAPES = {
    "tiny": DecoderConfig(512, 64, 128, 2, num_heads=4, num_kv_heads=2, head_dim=16, tie_embeddings=True),
    "smollm2-135m": DecoderConfig(49152, 576, 1536, 30, num_heads=9, num_kv_heads=3, head_dim=64, tie_embeddings=True),
    "smollm2-1.7b": DecoderConfig(
        49152, 2048, 8192, 24, num_heads=32, num_kv_heads=32, head_dim=64, tie_embeddings=True
    ),
    "llama-7b": DecoderConfig(32000, 4096, 11008, 32, num_heads=32, num_kv_heads=32, head_dim=128),
}
SIDES = Path(__file__).parent / "sides"
REFERENCES = ("copy", "cached")
OURS = (*REFERENCES, "none")  # peers that are this package itself, or nobody
FIXED = re.compile(r"(\d+)\+(\d+)")  # --lengths of random tokens, else a source of pairs
PLATFORMS = {"cpu": "cpu", "gpu": "cuda"}  # --device -> what JAX calls it
EOS = 0  # of the pairs below


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
      peer: trl, tunix, easydel, or ours with another reference, cached or copy, or without a peer: none.
      python: the interpreter of the peer's environment; see docs/performance.md.
      loss: dpo or orpo.
      shape: of the model, a key of SHAPES; its weights are random.
      lengths: P+R, tokens of every prompt and response, or a file of preference pairs, whose text is tokenized by a
        byte-level BPE trained on it, as large as the model's vocabulary.
      pairs: in a batch.
      max_length: longer pairs of a file are left out.
      steps: of each process; the first and those that compile are not counted.
      rounds: processes of each side.
      dtype, param_dtype: of the computation and of the weights.
      lora: rank of adapters, 0 trains all weights.
      remat, peer_remat: what our backward pass keeps, and whether the peer's recomputes activations: none or full.
      attention: of our decoder: tiles or cudnn.
      peer_head: whole, or fused: TRL's use_liger_kernel, which needs liger-kernel and a GPU.
      reference: copy, or cached: our log-probabilities of the reference, computed before.
      device: cpu or gpu; this process itself computes on the CPU.
      learning_rate: of AdamW without weight decay, constant.
      keep: directory to make the weights and pairs in, or where an earlier run made them; none is a temporary one.

    Returns:
      What was measured, medians over all steps that count.

    Raises:
      UserError: a side failed, compiled in every step, or computes another thing: see `refuse_others`.
    """
    choose("--shape", shape, SHAPES)
    choose("--loss", loss, dict.fromkeys(("dpo", "orpo")))
    choose("--device", device, PLATFORMS)
    scripts = {name: f"{name}_side.py" for name in ("trl", "tunix", "easydel")}
    scripts |= dict.fromkeys(OURS, "our_side.py")
    choose("--peer", peer, scripts)
    choose("--peer_head", peer_head, dict.fromkeys(("whole", "fused")))
    if peer_head == "fused" and (peer != "trl" or device != "gpu" or loss != "dpo"):
        raise UserError("--peer_head=fused is for --peer=trl --loss=dpo --device=gpu")
    if min(pairs, rounds, steps - 1, max_length) < 1:
        raise UserError("--pairs, --rounds and --max_length must be positive, --steps at least 2")
    choose("--reference", reference, dict.fromkeys(REFERENCES))
    choose("--peer_remat", peer_remat, REMAT if peer in OURS else dict.fromkeys(("none", "full")))
    if reference == "cached" and peer not in OURS:
        raise UserError("--reference=cached leaves out a pass that the peer makes; compare it with --peer=copy or none")
    if python != sys.executable and peer in OURS:
        raise UserError(f"--python is the peer's, and --peer={peer} runs in this environment")
    if loss == "orpo" and (reference == "cached" or peer in REFERENCES):
        raise UserError("--loss=orpo has no reference that could be cached; compare it with --peer=trl")
    losses = {"tunix": ("dpo",), "easydel": ("dpo", "orpo")}
    if peer in losses and (loss not in losses[peer] or lora or (dtype, param_dtype) != ("float32", "float32")):
        raise UserError(f"--peer={peer} is measured with --loss={' or '.join(losses[peer])}, all weights and float32")
    config = SHAPES[shape]
    with contextlib.ExitStack() as stack:
        scratch = Path(keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-")))
        model, drawn_from = scratch / f"{shape}-{dtype}", lengths
        if not FIXED.fullmatch(lengths):
            drawn_from = f"{Path(lengths).name}-{content_digest(lengths)[:8]}"
        data = scratch / f"{pairs}x{steps}-{max_length}-{config.vocab_size}-{drawn_from}.json"
        if not model.exists():
            hf_io.save_params(random_params(config, dtype), config, model, dtype=dtype)
        if not data.exists():
            found = json.dumps(pairs_for(lengths, config.vocab_size, pairs, steps, max_length))
            with whole(data) as part:
                part.write_text(found)
        spec = dict(model=str(model), pairs=str(data), loss=loss, size=pairs, steps=steps, max_length=max_length)
        spec |= dict(dtype=dtype, param_dtype=param_dtype, lora=lora, learning_rate=learning_rate, eos=EOS)
        spec |= dict(vocabulary=config.vocab_size, threads=len(os.sched_getaffinity(0)))
        spec |= dict(attention=attention, head=peer_head)
        ours = spec | dict(remat=remat, reference=reference)
        theirs = spec | dict(remat=peer_remat, reference=peer if peer in REFERENCES else reference)
        turns: list[dict[str, dict[str, Any]]] = []
        for number in range(rounds):
            turn = {"ours": side(sys.executable, "our_side.py", ours, device)}
            if peer != "none":
                turn[peer] = side(python, scripts[peer], theirs, device)
                refuse_others(turn, dtype)
                print(f"round {number + 1}: {ratio_of(turn, peer):.2f}", file=sys.stderr)
            turns.append(turn)
    return comparison(turns, peer, pairs)


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
        found = (f"{name} {x['losses'][:2]} at {x['chosen_logps']}" for name, x in turn.items())
        raise UserError(f"the first losses differ, so nothing is compared: {', '.join(found)}")


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


def comparison(turns: Sequence[dict[str, dict[str, Any]]], peer: str, pairs: int) -> dict[str, Any]:
    """The figures of `train` from what the sides measured in each round."""
    found: dict[str, Any] = {"device": turns[0]["ours"]["device"]}
    for name in turns[0]:
        results = [turn[name] for turn in turns]
        seconds = np.concatenate([warm(one, "seconds") for one in results])
        found |= {
            f"{name}, steps": len(seconds),
            f"{name}, s a step": float(np.median(seconds)),
            f"{name}, s a step, least": float(seconds.min()),
            f"{name}, s a step, most": float(seconds.max()),
            f"{name}, CPU-s a step": float(np.median(np.concatenate([warm(one, "cpu_seconds") for one in results]))),
            f"{name}, pairs/s": pairs / float(np.median(seconds)),
            f"{name}, peak memory, GiB": max(one["peak_bytes"] for one in results) / GIB,
            f"{name}, first step, s": float(np.median([one["seconds"][0] for one in results])),
        }
    ours = [turn["ours"] for turn in turns]
    names = ("tokens", "positions", "trained", "wait_seconds", "useful_flops", "seconds")
    counted = {name: np.concatenate([warm(one, name) for one in ours]) for name in names}
    useful = counted["useful_flops"] / counted["seconds"]
    found |= {
        "ours, trained tokens/s": float(counted["trained"].sum() / counted["seconds"].sum()),
        "ours, padding, share of positions": float(1 - counted["tokens"].sum() / counted["positions"].sum()),
        "ours, input wait, share of time": float(counted["wait_seconds"].sum() / counted["seconds"].sum()),
        "ours, programs compiled": max(one["programs"] for one in ours),
        "ours, compilation, s": float(np.median([one["compile_seconds"] for one in ours])),
        "ours, GFLOP/s on useful tokens": float(np.median(useful) / 1e9),
        "ours, share of this machine's matmul rate": float(
            np.median(useful) / np.median([x["matmul_flops"] for x in ours])
        ),
    }
    if peer == "none":
        return found
    rounds = [ratio_of(turn, peer) for turn in turns]
    apart = [np.abs(np.subtract(turn["ours"]["losses"], turn[peer]["losses"])).max() for turn in turns]
    return found | {
        "times as fast, each round": ", ".join(f"{ratio:.2f}" for ratio in rounds),
        "times as fast": float(np.median(rounds)),
        "memory, ours over theirs": found["ours, peak memory, GiB"] / found[f"{peer}, peak memory, GiB"],
        "largest difference of a loss": float(max(apart)),
        "peer's versions": ", ".join(f"{name} {version}" for name, version in turns[0][peer]["versions"].items()),
    }


def random_params(config: DecoderConfig, dtype: str) -> Any:
    """Parameters distributed as `init` draws them, but by NumPy and with repetitions: billions in seconds."""
    rng = np.random.default_rng(0)

    def drawn(path, x: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key == "scale":
            return np.ones(x.shape, x.dtype)
        block = (config.init_std * rng.standard_normal(min(x.size, 2**24), np.float32)).astype(x.dtype)
        return np.resize(block, x.shape)

    return jax.tree_util.tree_map_with_path(
        drawn, jax.eval_shape(make_decoder(config, param_dtype=dtype).init, jax.random.key(0))
    )


def pairs_for(lengths: str, vocabulary: int, size: int, steps: int, max_length: int) -> dict[str, list[list[int]]]:
    """Token ids of {prompt, chosen, rejected}, in balanced batches one after the other."""
    if fixed := FIXED.fullmatch(lengths):
        prompt, response = map(int, fixed.groups())
        rng = np.random.default_rng(0)

        def ids(count: int, end: list[int]) -> list[int]:
            return [*rng.integers(2, vocabulary, count - len(end)).tolist(), *end]

        drawn = [(ids(prompt, []), ids(response, [EOS]), ids(response, [EOS])) for _ in range(size * steps)]
    else:
        records, _ = read_records(lengths)
        texts = [(record.prompt, record.chosen, record.rejected) for record in records]
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["</s>", "<unk>"])
        tokenizer.train_from_iterator((text for three in texts for text in three), trainer)
        encoded = [[one.ids for one in tokenizer.encode_batch(list(three))] for three in texts]
        drawn = [(prompt, chosen + [EOS], rejected + [EOS]) for prompt, chosen, rejected in encoded]
        drawn = [x for x in drawn if len(x[0]) + max(len(x[1]), len(x[2])) <= max_length and x[1] != x[2]]
        lengths_ = lengths_of([Pair(*map(np.array, x)) for x in drawn], Layout())
        order = np.random.default_rng(0).permutation(len(drawn))
        batches = balanced(lengths_.of(order), size)
        dealt = [order[batches[b]] for b in np.random.default_rng(1).permutation(len(batches))]
        drawn = [drawn[i] for batch in dealt for i in batch]
    if len(drawn) < size * steps:
        raise UserError(f"{lengths}: {len(drawn)} pairs of at most {max_length} tokens are not enough")
    return dict(zip(("prompt", "chosen", "rejected"), map(list, zip(*drawn, strict=True)), strict=True))


def side(python: str, script: str, spec: dict[str, Any], device: str) -> dict[str, Any]:
    """Runs one side in a process of its own; what it measured.

    Raises:
      UserError: it failed.
    """
    environment = {**os.environ, "JAX_PLATFORMS": PLATFORMS[device], "HF_HUB_OFFLINE": "1"}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # compilation is measured too
    environment["JAX_TRACEBACK_FILTERING"] = "off"  # so that an error's last line is the error
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    flags = environment.get("XLA_FLAGS", "").split()
    environment["XLA_FLAGS"] = " ".join(x for x in flags if "device_count" not in x)  # one device, not many simulated
    if script != "our_side.py":
        environment.pop("PYTHONPATH", None)
    command = [python, str(SIDES / script), json.dumps(spec)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        last = next(iter(done.stderr.strip().splitlines()[-1:]), "no message")
        raise UserError(f"{script} ended with status {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def pack(*, data: str = "", vocabulary: int = 49152, max_length: int = 512, pairs: str = "8,64,512") -> dict[str, Any]:
    """The input pipeline alone, on one core: pairs packed in a second.

    Args:
      data: a file of preference pairs, tokenized as in `train`.
      vocabulary: of the tokenizer.
      max_length: longer pairs are left out.
      pairs: batch sizes.

    Returns:
      For each batch size pairs a second and the share of positions that is padding.
    """
    if not data:
        raise UserError("--data is missing: a file of preference pairs")
    sizes = [int(text) for text in pairs.split(",")]
    if min(sizes) < 1:
        raise UserError(f"--pairs={pairs} must be positive")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        path = Path(scratch) / "pairs.json"
        path.write_text(json.dumps(pairs_for(data, vocabulary, max(sizes), 1, max_length)))
        found, *_ = measured("pack_step", path=str(path), sizes=sizes, devices=1)
    return found


def pack_step(path: str, sizes: Sequence[int], devices: int) -> dict[str, Any]:
    """Packs for two seconds a batch size, in the order of training."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
    sides = json.loads(Path(path).read_text()).values()
    data = [Pair(*(np.array(ids, np.int32) for ids in three)) for three in zip(*sides, strict=True)]
    mean = float(lengths_of(data, Layout()).pieces.mean())
    found: dict[str, Any] = {"pairs": float(len(data)), "tokens a pair": mean}
    for size in sizes:
        began = time.perf_counter()
        chosen = make_pair_set(data, size)
        found[f"{size} pairs: shapes chosen, s"] = time.perf_counter() - began
        batches = balanced(chosen.lengths, size)
        done, tokens, positions, began = 0, 0, 0, time.perf_counter()
        while time.perf_counter() - began < 2:
            batch = batch_of(chosen, batches[done % len(batches)])
            done += 1
            tokens, positions = tokens + np.count_nonzero(batch.segments), positions + batch.segments.size
        found[f"{size} pairs: packed, pairs/s"] = done * size / (time.perf_counter() - began)
        found[f"{size} pairs: padding, share of positions"] = float(1 - tokens / positions)
    return found


def cost(
    *, tokens: int = 64, vocabulary: int = 8192, layers: int = 6, width: int = 256, pairs: int = 8, steps: int = 4
) -> dict[str, Any]:
    """How the time of a DPO step grows with tokens, vocabulary, depth, width and batch: each doubled in turn.

    Args:
      tokens: of a response; a prompt has twice as many.
      vocabulary, layers, width: of the model.
      pairs: in a batch.
      steps: of each, the first not counted.

    Returns:
      For each the time and the counted operations, both as multiples of the base's.
    """
    base = dict(tokens=tokens, vocabulary=vocabulary, layers=layers, width=width, pairs=pairs)
    return measured("cost_step", base=base, steps=steps, devices=1)[0]


def cost_step(base: dict[str, int], steps: int, devices: int) -> dict[str, Any]:
    """The steps of `cost`, in a process of its own."""
    found: dict[str, Any] = {}
    for name in (None, *base):
        of = base | ({name: 2 * base[name]} if name else {})
        heads = of["width"] // 64
        config = DecoderConfig(
            of["vocabulary"], of["width"], 3 * of["width"], of["layers"], heads, heads, 64, tie_embeddings=True
        )
        model, mesh, optimizer = make_decoder(config), make_mesh({"data": 1}), optax.adamw(1e-6)
        rng = np.random.default_rng(0)
        lengths = [2 * of["tokens"], of["tokens"], of["tokens"]]
        drawn = [[rng.integers(1, of["vocabulary"], n).astype(np.int32) for n in lengths] for _ in range(of["pairs"])]
        data = make_pair_set([Pair(*ids) for ids in drawn], of["pairs"])
        batch = batch_of(data, np.arange(of["pairs"]))
        params = model.init(jax.random.key(0))
        state = init_state(params, optimizer, mesh, jax.tree.map(jnp.copy, params))
        del params
        step, seconds = make_train_step(model, make_loss("dpo"), optimizer, mesh), []
        flops = count_flops(step, shapes_of(state), batch)
        for _ in range(steps):
            began = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - began)
        time_of = float(np.median(seconds[1:]))
        if name is None:
            found |= {"base, s": time_of, "base, GFLOP": flops / 1e9, "base, compilation, s": seconds[0] - time_of}
        else:
            found[f"{name} x 2: time x"] = time_of / found["base, s"]
            found[f"{name} x 2: operations x"] = flops / 1e9 / found["base, GFLOP"]
            found[f"{name} x 2: compilation x"] = (seconds[0] - time_of) / found["base, compilation, s"]
    return found


# What is trained -> its adapters, and the bits of the frozen base.
TRAINED: dict[str, tuple[Lora | None, str | None]] = {
    "all weights": (None, None),
    "LoRA": (Lora(rank=16), None),
    "DoRA": (Lora(rank=16, dora=True), None),
    "LoRA over int8": (Lora(rank=16), "int8"),
    "LoRA over nf4": (Lora(rank=16), "nf4"),
}


def memory(*, model: str = "", pairs: int = 16, length: int = 64, remat: str = "full") -> dict[str, Any]:
    """What a DPO step holds, as XLA has it of the compiled program; nothing is run and no weights are read.

    Args:
      model: directory with a config.json.
      pairs: in the batch.
      length: tokens of each prompt and each response.
      remat: what the backward pass keeps of a layer.

    Returns:
      For each of TRAINED the MiB of what stays from step to step (weights, moments, reference) and of what does not.
    """
    if not model:
        raise UserError("--model is missing: a directory with a config.json")
    config, rng, out = hf_io.load_config(model), np.random.default_rng(0), {}
    drawn = [[rng.integers(3, config.vocab_size, length).astype(np.int32) for _ in range(3)] for _ in range(pairs)]
    data = [Pair(*ids) for ids in drawn]
    batch = batch_of(make_pair_set(data, pairs), np.arange(pairs))
    mesh, optimizer, loss = make_mesh({"data": 1}), optax.adamw(1e-4), make_loss("dpo")
    for name, (lora, bits) in TRAINED.items():
        decoder = make_decoder(config, lora=lora, remat=remat)

        def state(key: jax.Array, decoder=decoder, lora=lora, bits=bits) -> TrainState:
            base = decoder.init(key)
            base = quantize_params(base, bits) if bits else base
            params = init_adapters(key, base, lora) if lora else base
            return TrainState(jnp.int32(0), params, optimizer.init(params), base)

        abstract = jax.eval_shape(state, jax.random.key(0))
        found = make_train_step(decoder, loss, optimizer, mesh).lower(abstract, batch).compile().memory_analysis()
        trained = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
        out[f"{name}: trained, millions"] = trained / 1e6
        out[f"{name}: kept, MiB"] = found.argument_size_in_bytes / 2**20
        out[f"{name}: during the step, MiB"] = found.temp_size_in_bytes / 2**20
    return out


def data(*, pairs: float = 1e6, max_length: int = 512, keep: str = "") -> dict[str, Any]:
    """A file of made-up pairs -> the first batch, read and tokenized, and again from the cache, in a process each.

    Args:
      pairs: in the file, about 70 tokens each.
      max_length: longer pairs are left out.
      keep: directory for the file and the cache, or where an earlier run left them; none is a temporary one.

    Returns:
      For both seconds to the first batch, by the clock and of all processors, imports left out, and peaks of memory,
      imports included. File-backed memory is mapped from the files, and free for others to take.
    """
    if pairs < 16 or max_length < 2:
        raise UserError(f"--pairs={pairs:g} must be at least 16 and --max_length={max_length} at least 2")
    with contextlib.ExitStack() as stack:
        directory = Path(keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-")))
        file = directory / f"{int(pairs)}.jsonl"
        write_pairs(directory, file, int(pairs))
        out: dict[str, Any] = {"file, GiB": file.stat().st_size / GIB}
        for name in ("made", "cached"):
            step = dict(path=str(file), max_length=max_length, made=name == "made", devices=1)
            found, anonymous, mapped = measured("data_step", **step)
            out |= {f"{name}: {key}": value for key, value in found.items()}
            out[f"{name}: peak anonymous memory, GiB"] = anonymous / GIB
            out[f"{name}: peak file-backed memory, GiB"] = mapped / GIB
    return out


def write_pairs(directory: Path, file: Path, count: int) -> None:
    """A file of made-up preference pairs of different lengths and a tokenizer beside it, unless they are there."""
    if file.exists() and (directory / "tokenizer").exists():
        return
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(5000)]
    often = rng.zipf(1.3, 400_000) % len(words)
    sentences = [" ".join(words[i] for i in often[at : at + rng.integers(5, 20)]) + "." for at in range(0, 380_000, 20)]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=8192, special_tokens=["</s>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(sentences, trainer)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    wrapped.save_pretrained(directory / "tokenizer")

    def text(most: int) -> str:
        return " ".join(sentences[i] for i in rng.integers(0, len(sentences), rng.integers(1, most + 1)))

    with whole(file) as part, part.open("w", encoding="utf-8") as out:
        for number in range(count):
            row = {"prompt": f"Question {number}. {text(3)}", "chosen": f" {text(2)}", "rejected": f" {text(2)}"}
            out.write(json.dumps(row) + "\n")


def data_step(path: str, max_length: int, made: bool, devices: int) -> dict[str, Any]:
    """Seconds to the first batch of a file of pairs, and what the batches after it take."""
    directory = Path(path).parent
    config = defaults("dpo")
    config.data.path, config.data.cache_dir, config.max_length = path, str(directory / "cache"), max_length
    if made:
        shutil.rmtree(directory / "cache", ignore_errors=True)
    began, busy = time.perf_counter(), time.process_time()
    tokenizer = load_tokenizer(directory / "tokenizer")
    pairs = load_pairs(read(config, complete=False), tokenizer).training
    loaded = time.perf_counter()
    set_ = make_pair_set(pairs, config.batch_size)
    batches = train_batches(set_, seed=0, shuffle=True, start=0, stop=max(1, len(pairs) // config.batch_size))
    next(batches)
    first, busy = time.perf_counter(), time.process_time() - busy
    more = sum(1 for _ in itertools.islice(batches, 1000))
    rate = more * config.batch_size / (time.perf_counter() - first)
    tokens = int(pairs.length.sum())
    return {
        "pairs": len(pairs),
        "tokens, millions": tokens / 1e6,
        "seconds to the pairs": loaded - began,
        "seconds to the first batch": first - began,
        "processor seconds to it": busy,
        "pairs a second after it": rate,
    }


BENCHMARKS: dict[str, Callable[..., dict[str, Any]]] = {
    "import": import_,
    "memory": memory,
    "decode": decode,
    "train": train,
    "pack": pack,
    "data": data,
    "cost": cost,
}


def shape_of(params: float) -> DecoderConfig:
    """The Llama of nearest size, of 64-wide heads in groups of 4, with a layer for every 128 of width."""

    def shape(width: int) -> DecoderConfig:
        heads = dict(num_heads=width // 64, num_kv_heads=max(1, width // 256), head_dim=64)
        layers = max(2, width // 128)
        return DecoderConfig(16 * width, width, 7 * width // 2, layers, **heads)

    def size(config: DecoderConfig) -> int:
        return sum(int(np.prod(shape)) for _, shape in llama_tensors(config))

    return min((shape(width) for width in range(64, 16385, 64)), key=lambda config: abs(size(config) - params))


def llama_tensors(c: DecoderConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and stored shape of every tensor; written out, since asking the decoder would occupy the device."""
    width, inner, heads, kv = c.hidden_size, c.intermediate_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    yield "model.embed_tokens.weight", (c.vocab_size, width)
    for layer in range(c.num_layers):
        for name, shape in (
            ("self_attn.q_proj", (heads, width)),
            ("self_attn.k_proj", (kv, width)),
            ("self_attn.v_proj", (kv, width)),
            ("self_attn.o_proj", (width, heads)),
            ("mlp.gate_proj", (inner, width)),
            ("mlp.up_proj", (inner, width)),
            ("mlp.down_proj", (width, inner)),
            ("input_layernorm", (width,)),
            ("post_attention_layernorm", (width,)),
        ):
            yield f"model.layers.{layer}.{name}.weight", shape
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (c.vocab_size, width)


def write_checkpoint(directory: Path, config: DecoderConfig, tensors: dict[str, tuple[int, ...]]) -> None:
    """Random weights in bfloat16, in up to four files and an index; a whole one that is there already is left alone.

    Raises:
      UserError: the directory holds something else.
    """
    wanted, written = families.to_hf(config), directory / "config.json"
    if written.is_file():
        if json.loads(written.read_text(encoding="utf-8")) != wanted:
            raise UserError(f"--keep={directory} holds another model; name another directory, or its --params")
        return
    directory.mkdir(parents=True, exist_ok=True)
    rng, total = np.random.default_rng(0), sum(int(np.prod(shape)) for shape in tensors.values())
    parts, used = [[]], 0
    for name, shape in tensors.items():
        if used > total * len(parts) / 4:
            parts.append([])
        parts[-1].append(name)
        used += int(np.prod(shape))
    weight_map = {}
    for number, names in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        drawn = {name: rng.standard_normal(tensors[name], np.float32) for name in names}
        save_file({name: (0.02 * x).astype(ml_dtypes.bfloat16) for name, x in drawn.items()}, directory / file)
    write_json(directory / hf_io.INDEX, {"metadata": {"total_size": 2 * total}, "weight_map": weight_map})
    write_json(written, wanted)  # last: it says that the rest is whole


def load(directory: str, dtype: str, quantize: str, devices: int) -> dict[str, Any]:
    """Loads the parameters; compilation is part of the time."""
    config, kind = hf_io.load_config(directory), None if quantize == "none" else quantize

    def init(key: jax.Array) -> Any:
        params = make_decoder(config).init(key)
        return quantize_params(params, kind) if kind else params

    shardings = param_shardings(make_mesh({"fsdp": devices}), jax.eval_shape(init, jax.random.key(0)))
    before, _ = resident(os.getpid())
    began = time.monotonic()
    params = hf_io.load_params(directory, config, dtype=dtype, quantize=kind, shardings=shardings)
    jax.block_until_ready(params)
    return {
        "seconds": time.monotonic() - began,
        "device": jax.default_backend(),
        "parameter bytes": sum(s.data.nbytes for leaf in jax.tree.leaves(params) for s in leaf.addressable_shards),
        "anonymous before": before,
    }


def decode_step(
    directory: str, who: str, rows: int, prompt: int, new_tokens: int, cores: int, devices: int
) -> dict[str, Any]:
    """One side of `decode`: seconds of the first run and of three more, and the tokens."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])  # before either library starts its threads
    config = hf_io.load_config(directory)
    ids = np.random.default_rng(0).integers(3, config.vocab_size, (rows, prompt)).astype(np.int32)
    if who == "ours":
        model, params = make_decoder(config), hf_io.load_params(directory, config)
        options = dict(seed=0, stop_tokens=[], sampling=Sampling(temperature=0.0), batch_size=rows)

        def run() -> list[list[int]]:
            drawn = sample(model, params, list(ids), max_new_tokens=new_tokens, **options)
            return [one.tokens.tolist() for (one,) in drawn]
    else:
        import torch
        import transformers

        torch.set_num_threads(cores)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        theirs.generation_config.eos_token_id = None  # nothing stops
        text = torch.from_numpy(ids).long()
        options = dict(attention_mask=torch.ones_like(text), do_sample=False, pad_token_id=0)

        def run() -> list[list[int]]:
            return theirs.generate(text, max_new_tokens=new_tokens, **options)[:, prompt:].tolist()

    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        tokens = run()
        seconds.append(time.perf_counter() - began)
    return {"first": seconds[0], "seconds": seconds[1:], "tokens": tokens}


STEPS: dict[str, Callable[..., dict[str, Any]]] = {
    "load": load,
    "decode_side": decode_step,
    "pack_step": pack_step,
    "data_step": data_step,
    "cost_step": cost_step,
}


def measured(step: str, **arguments: Any) -> tuple[dict[str, Any], int, int]:
    """Runs a step in a process of its own.

    Args:
      step: a key of STEPS.
      **arguments: its arguments; `devices` is how many a CPU simulates.

    Returns:
      (what it returned, peak of its anonymous memory, peak of its file-backed memory), both in bytes.

    Raises:
      UserError: it failed.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={arguments['devices']}".strip()
    command = [sys.executable, str(Path(__file__).resolve()), step, json.dumps(arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "XLA_FLAGS": flags}) as child:
        peaks = (0, 0)
        while child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                peaks = tuple(map(max, peaks, resident(child.pid)))
            time.sleep(0.002)
        text = child.stdout.read()
    if child.returncode:
        raise UserError(f"the process that was to {step} ended with status {child.returncode}")
    return json.loads(text.splitlines()[-1]), *peaks


def resident(pid: int) -> tuple[int, int]:
    """Bytes of a process's anonymous and of its file-backed memory, now; 0 once it has ended.

    Raises:
      UserError: the system does not say.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        raise UserError("memory is read from /proc/PID/status, which this system does not have; use Linux") from None
    fields = dict(line.split(":", 1) for line in lines)
    return tuple(1024 * int(fields.get(name, "0").split()[0]) for name in ("RssAnon", "RssFile"))


def table(name: str, found: dict[str, Any]) -> str:
    """Two columns."""
    rows = [(key, value if isinstance(value, bool | str) else f"{value:,.3f}") for key, value in found.items()]
    return f"{name}\n{aligned((), rows, indent=2)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a benchmark, or a step of one in this process."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] and argv[0] in STEPS:
        print(json.dumps(STEPS[argv[0]](**json.loads(argv[1]))))
        return 0
    parser = cli.Parser(prog="benchmark.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    names = parser.add_subparsers(dest="benchmark", required=True)
    for name, function in BENCHMARKS.items():
        one = names.add_parser(name, description=function.__doc__.splitlines()[0], allow_abbrev=False)
        for option, default in hyper_parameters(function).items():
            one.add_argument(f"--{option}", type=type(default), default=default)
        one.add_argument("--out", required=True, help="JSON file to write")
    options = vars(parser.parse_args(argv))
    name, out = options.pop("benchmark"), Path(options.pop("out"))
    found = BENCHMARKS[name](**options)
    print(table(name, found))
    versions = {package: importlib.metadata.version(package) for package in ("jax", "jaxlib")}
    versions["prefalign_jax"] = prefalign_jax.__version__
    made_by = {"python": platform.python_version(), "processors": os.cpu_count(), **versions}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {"benchmark": name, "options": options, "made by": made_by, "found": found})
    return 0


if __name__ == "__main__":
    sys.exit(cli.status_of(main))
