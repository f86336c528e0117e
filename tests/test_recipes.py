"""Published recipes: their numbers, their models' shapes on their meshes, a step of each, and the page of them all."""

import importlib.util
import json
import math
import pathlib
import re
from typing import NamedTuple

import jax
import optax
import pytest
from jax.sharding import AbstractMesh

from conftest import longer
from prefalign_jax.cost.plan import SHAPES, shape_of
from prefalign_jax.data.records import read_records
from prefalign_jax.experiment import read
from prefalign_jax.models.decoder import make_decoder
from prefalign_jax.models.lora import Lora, init_adapters
from prefalign_jax.models.quantize import quantize_params
from prefalign_jax.optim import OPTIMIZERS, make_optimizer
from prefalign_jax.options import given, hyper_parameters
from prefalign_jax.sharding import AXES, axis_sizes, param_shardings, state_shardings
from prefalign_jax.train import train
from prefalign_jax.types import TrainState, UserError

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("handbook", "course")
FILES = sorted(f"{folder}/{path.name}" for folder in FOLDERS for path in (ROOT / "experiments" / folder).glob("*.py"))
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")


class Published(NamedTuple):
    """What a recipe's source says.

    Attributes:
      warmup: a share of the run, or steps.
      batch: (examples a device, micro-steps, devices).
      run: the duration by its unit.
      test: the split that is held out.
      lora: rank, alpha, dropout.
      every: steps between evaluations.
    """

    loss: dict
    rate: float
    schedule: str
    warmup: float | int
    batch: tuple[int, int, int]
    length: int
    run: dict
    model: str
    data: str
    split: str = "train"
    test: str | None = None
    shape: str = "mistral-7b"
    dtype: str = "bfloat16"
    optimizer: str = "adamw"
    clip: float = 1.0
    template: str | None = None
    lora: tuple | None = None
    every: int | None = None
    save: int | None = None


ULTRAFEEDBACK = dict(data="HuggingFaceH4/ultrafeedback_binarized", split="train_prefs", test="test_prefs")
ZEPHYR = dict(model="alignment-handbook/zephyr-7b-sft-full", every=100, save=100, **ULTRAFEEDBACK)
CAI = dict(data="HuggingFaceH4/cai-conversation-harmless", save=100)
SMOLLM2_SFT = dict(template="chatml", test="test")
SMOLLM2_DPO = dict(every=100, **ULTRAFEEDBACK)
SMOLLM3 = dict(model="SFT", data="HuggingFaceTB/smoltalk2:Preference", shape="smollm3-3b", clip=0.2)
COURSE = dict(shape="smollm2-135m", model="HuggingFaceTB/SmolLM2-135M")
BASE = dict(dtype="float32", **COURSE)
HH = dict(data="Anthropic/hh-rlhf", test="test", save=100, **BASE)
SFT = dict(name="sft", over="prompt+chosen", mean="batch")


def dpo(beta: float) -> dict:
    return dict(name="dpo", beta=beta, label_smoothing=0.0, reference_free=False)


def trl_orpo(lam: float) -> dict:
    return dict(name="orpo", lam=lam, nll_over="prompt+chosen", nll_mean="batch", ratio="odds", extra_eos=False)


APO = dict(name="apo_zero", beta=0.05)
THREE, TWO, ONE = dict(epochs=3.0), dict(epochs=2.0), dict(epochs=1.0)
# Loss, peak rate, schedule, warm-up, (examples a device, micro-steps, devices), max_length, duration.
PUBLISHED = {
    "handbook/zephyr_7b_dpo.py": Published(dpo(0.01), 5e-7, "cosine", 0.1, (8, 2, 8), 1024, ONE, **ZEPHYR),
    "handbook/zephyr_7b_dpo.py:qlora": Published(
        dpo(0.01), 5e-6, "cosine", 0.1, (4, 4, 8), 1024, ONE, lora=(128, 128.0, 0.05), **ZEPHYR
    ),
    "handbook/zephyr_gemma_dpo.py": Published(
        dpo(0.05), 5e-7, "cosine", 0.1, (2, 8, 8), 1024, TWO, "HuggingFaceH4/zephyr-7b-gemma-sft-v0.1",
        "argilla/dpo-mix-7k", test="test", shape="gemma-7b", every=100,
    ),
    "handbook/zephyr_141b_orpo.py": Published(
        trl_orpo(0.05), 5e-6, "inverse_sqrt", 100, (1, 1, 32), 2048, THREE, "mistral-community/Mixtral-8x22B-v0.1",
        "argilla/distilabel-capybara-dpo-7k-binarized", shape="mixtral-8x22b", template="zephyr",
    ),
    "handbook/smollm2.py:sft": Published(
        SFT, 3e-4, "cosine", 0.1, (4, 4, 8), 8192, TWO, "HuggingFaceTB/SmolLM2-1.7B", "HuggingFaceTB/smoltalk:all",
        shape="smollm2-1.7b", **SMOLLM2_SFT,
    ),
    "handbook/smollm2.py:sft,size=135M": Published(
        SFT, 1e-3, "cosine", 0.1, (4, 4, 8), 8192, TWO, "HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/smol-smoltalk",
        shape="smollm2-135m", **SMOLLM2_SFT,
    ),
    "handbook/smollm2.py:sft,size=360M": Published(
        SFT, 1e-3, "cosine", 0.1, (4, 4, 8), 8192, TWO, "HuggingFaceTB/SmolLM2-360M", "HuggingFaceTB/smol-smoltalk",
        shape="smollm2-360m", **SMOLLM2_SFT,
    ),
    "handbook/smollm2.py:dpo": Published(
        dpo(0.5), 1e-6, "cosine", 0.1, (2, 8, 8), 1024, THREE, "loubnabnl/smollm2-1.7B-sft", shape="smollm2-1.7b",
        **SMOLLM2_DPO,
    ),
    "handbook/smollm2.py:dpo,size=135M": Published(
        dpo(0.5), 1e-6, "cosine", 0.1, (2, 8, 8), 1024, TWO, "loubnabnl/smollm2-135M-sft", shape="smollm2-135m",
        **SMOLLM2_DPO,
    ),
    "handbook/smollm2.py:dpo,size=360M": Published(
        dpo(0.5), 1e-6, "cosine", 0.1, (2, 8, 8), 1024, TWO, "loubnabnl/smollm2-360M-sft", shape="smollm2-360m",
        **SMOLLM2_DPO,
    ),
    "handbook/smollm3_apo_zero.py:model=SFT": Published(  # 2 micro-steps on 16 devices there
        APO, 1e-6, "cosine", 0.1, (1, 4, 8), 24576, ONE, split="llama_3.1_tulu_3_8b_preference_mixture_no_think",
        **SMOLLM3,
    ),
    "handbook/smollm3_apo_zero.py:think,model=SFT": Published(
        APO, 1e-6, "cosine", 0.1, (1, 4, 8), 24576, ONE, split="tulu_3_8b_pref_mix_Qwen3_32B_Qwen3_0.6B_think",
        **SMOLLM3,
    ),
    "handbook/constitutional_ai.py:sft": Published(
        SFT, 2e-5, "cosine", 0.1, (8, 4, 8), 2048, ONE, "mistralai/Mistral-7B-v0.1", split="train_sft",
        test="test_sft", template="zephyr", **CAI,
    ),
    "handbook/constitutional_ai.py:dpo": Published(
        dpo(0.1), 5e-7, "linear", 0.1, (2, 1, 8), 1024, THREE, "alignment-handbook/mistral-7b-sft-constitutional-ai",
        split="train_prefs", test="test_prefs", optimizer="rmsprop", every=1000, **CAI,
    ),
    "handbook/beta_loss_scan.py": Published(dpo(0.1), 5e-7, "cosine", 0.1, (8, 2, 8), 1024, ONE, **ZEPHYR),
    "handbook/beta_loss_scan.py:openhermes": Published(
        dpo(0.1), 5e-7, "cosine", 0.1, (8, 2, 8), 1024, ONE,
        **{**ZEPHYR, "model": "teknium/OpenHermes-2.5-Mistral-7B", "data": "HuggingFaceH4/orca_dpo_pairs"},
    ),
    "course/smollm2_dpo.py": Published(
        dpo(0.1), 5e-5, "cosine", 100, (4, 4, 1), 1536, dict(steps=200), data="trl-lib/ultrafeedback_binarized",
        **{**COURSE, "model": "HuggingFaceTB/SmolLM2-135M-Instruct"},
    ),
    "course/smollm2_dpo.py:hh_rlhf": Published(dpo(0.1), 5e-5, "linear", 0, (4, 1, 1), 1024, THREE, **HH),
    "course/smollm2_orpo.py": Published(
        trl_orpo(0.1), 8e-6, "linear", 10, (2, 4, 1), 1024, ONE, data="trl-lib/ultrafeedback_binarized", test="test",
        template="chatml", every=math.ceil(0.2 * math.ceil(62135 / 8)), **BASE,
    ),
    "course/smollm2_orpo.py:orpo_dpo_mix": Published(
        trl_orpo(0.1), 8e-6, "linear", 10, (2, 4, 1), 1024, ONE, data="mlabonne/orpo-dpo-mix-40k",
        template="chatml", every=1554, **BASE,
    ),
    "course/smollm2_orpo.py:hh_rlhf": Published(trl_orpo(0.1), 5e-5, "linear", 0, (4, 1, 1), 1024, THREE, **HH),
}  # fmt: skip
variants = pytest.mark.parametrize("name", PUBLISHED)

DEVICE = 80  # GB that the pages and docstrings state


def module_of(name: str):
    path = ROOT / "experiments" / name.partition(":")[0]
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recipe(name: str):
    """The config of 'folder/file.py:argument'."""
    _, colon, arg = name.partition(":")
    return module_of(name).get_config(*([arg] if colon else []))


# The numbers


@variants
def test_a_recipe_has_the_published_numbers(name):
    c, wanted = recipe(name), PUBLISHED[name]
    loss = read(c).loss
    assert c.is_locked
    assert {"name": loss.name, **loss.hyper} == wanted.loss
    assert (c.learning_rate, c.schedule, c.grad_clip) == (wanted.rate, wanted.schedule, wanted.clip)
    if isinstance(wanted.warmup, float):
        assert (c.warmup_epochs, c.warmup_steps) == (pytest.approx(wanted.warmup * c.epochs), 0)
    else:
        assert (c.warmup_steps, c.warmup_epochs) == (wanted.warmup, None)
    assert {unit: c[unit] for unit in ("steps", "examples", "epochs") if c[unit] is not None} == wanted.run
    assert (c.batch_size, c.micro_steps) == (math.prod(wanted.batch), wanted.batch[1])
    assert c.max_length == wanted.length
    assert (c.model.path, c.data.path, c.data.split) == (wanted.model, wanted.data, wanted.split)
    if wanted.test:
        assert (c.data.eval_path, c.data.eval_split) == (wanted.data, wanted.test)
    assert (c.eval_steps, c.save_steps) == (wanted.every, wanted.save)
    assert (c.data.chat_template, c.seed) == (wanted.template, 42)
    assert (c.dtype, c.model.param_dtype) == (wanted.dtype, "float32")

    used = {**hyper_parameters(OPTIMIZERS[c.optimizer.name]), **given(c.optimizer)}
    adamw, rmsprop = dict(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0), dict(decay=0.99, eps=1e-8)
    assert (c.optimizer.name, used) == (wanted.optimizer, {"adamw": adamw, "rmsprop": rmsprop}[wanted.optimizer])
    assert ((c.lora.rank, c.lora.alpha, c.lora.dropout) if c.lora.rank else None) == wanted.lora
    assert c.model.quantize == ("nf4" if wanted.lora else None)


def test_adapters_are_on_all_seven_linear_maps():
    c = recipe("handbook/zephyr_7b_dpo.py:qlora")
    _, state = abstract(c, "mistral-7b")
    found = {f"{group}/{name}" for group, names in state.params["layers"].items() for name in names}
    assert found == {*(f"attention/{x}" for x in "qkvo"), *(f"mlp/{x}" for x in ("gate", "up", "down"))}


def test_the_scan_is_three_losses_times_ten_betas():
    module = module_of("handbook/beta_loss_scan.py")
    grid, found = [0.01, *(n / 10 for n in range(1, 10))], set()
    for overrides in module.sweep():
        c = module.get_config()
        c.update_from_flattened_dict(overrides)
        hyper = read(c).loss.hyper
        assert hyper.get("per_token", True)
        found.add((c.loss.name, hyper["tau" if c.loss.name == "ipo" else "beta"]))
    assert found == {(loss, beta) for loss in ("dpo", "kto_pair", "ipo") for beta in grid}
    assert len(module.sweep()) == 30


@pytest.mark.parametrize("file", FILES)
def test_a_docstring_names_its_commands_source_mesh_and_differences(file):
    doc = " ".join(module_of(file).__doc__.split())
    for part in (f"--config=experiments/{file}", "Source: ", "Different here: ", "Not run here at full size."):
        assert part in doc, part
    for n in {PUBLISHED[name].batch[2] for name in PUBLISHED if name.startswith(file)}:
        assert ("Mesh: one device" if n == 1 else f"Mesh: fsdp={n}, {n} devices of {DEVICE} GB") in doc
    # Every argument that it names is one of those checked here.
    known = {name for name in PUBLISHED if name.startswith(file)}
    named = re.findall(rf"{file}:([\w.=,]+)", doc) + re.findall(r"`:([\w.=,]+)`", doc)
    assert {f"{file}:{arg}" for arg in named} <= known


def test_every_recipe_is_checked_and_a_mistyped_argument_is_refused():
    assert {name.partition(":")[0] for name in PUBLISHED} == set(FILES)
    for file in FILES:
        if module_of(file).get_config.__code__.co_argcount:
            with pytest.raises(UserError, match="'qlroa'"):
                recipe(f"{file}:qlroa")


# The published shapes


def abstract(c, shape: str) -> tuple[optax.GradientTransformation, TrainState]:
    """The optimizer, and the shapes of the train state as a run makes it."""
    params = jax.eval_shape(
        make_decoder(shape_of(shape), param_dtype=c.model.param_dtype).init,
        jax.random.key(0),
    )
    reference = None if c.reference.kind == "none" else params
    if c.lora.rank:
        reference = jax.eval_shape(lambda tree: quantize_params(tree, c.model.quantize), params)
        lora = Lora(**given(c.lora))
        params = jax.eval_shape(lambda tree: init_adapters(jax.random.key(0), tree, lora), reference)
    optimizer = make_optimizer(read(c).plain["optimizer"], lambda step: c.learning_rate, c.grad_clip)
    state = TrainState(0, params, jax.eval_shape(optimizer.init, params), reference)
    return optimizer, state


def mesh_of(c, devices: int) -> AbstractMesh:
    return AbstractMesh(axis_sizes(c.mesh, devices), AXES)


def gigabytes(name: str) -> float:
    """Weights, gradients, moments and reference, in GB on each device of the stated mesh."""
    c, (*_, devices) = recipe(name), PUBLISHED[name].batch
    optimizer, state = abstract(c, PUBLISHED[name].shape)
    shardings = state_shardings(mesh_of(c, devices), state)
    total = 0
    for arrays, where in ((state, shardings), (state.params, shardings.params)):  # gradients lie as the weights do
        for leaf, sharding in zip(jax.tree.leaves(arrays), jax.tree.leaves(where), strict=True):
            if hasattr(leaf, "dtype"):  # the step is a plain number here
                total += math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total / 1e9


@variants
def test_the_published_shape_fits_the_stated_mesh(name):
    c, wanted = recipe(name), PUBLISHED[name]
    assert c.max_length <= SHAPES[wanted.shape]["max_position_embeddings"]
    _, state = abstract(c, wanted.shape)
    mesh, whole = mesh_of(c, wanted.batch[2]), AbstractMesh((1,) * len(AXES), AXES)
    assert mesh.size == wanted.batch[2]
    for tree in (state.params, state.reference or {}):
        # An axis that does not divide would be left out; on the mesh of one device every axis divides.
        found, full = (jax.tree.map(lambda s: s.spec, param_shardings(m, tree)) for m in (mesh, whole))
        assert found == full
    assert gigabytes(name) < DEVICE


def test_the_memory_of_a_full_run_is_what_the_arithmetic_says():
    """float32 weights, gradients, two moments and the reference: 20 bytes a parameter, of which norms are a trifle."""
    assert gigabytes("handbook/zephyr_7b_dpo.py") == pytest.approx(20 * 7_241_732_096 / 8 / 1e9, rel=1e-3)
    assert gigabytes("handbook/zephyr_141b_orpo.py") == pytest.approx(16 * 140_620_634_112 / 32e9, rel=1e-3)


# A step of each


def message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def rows_of(data: str, count: int) -> list[dict]:
    """Rows in the format of a published set."""
    rows = []
    for n in range(count):
        question, better, worse = f"What is {n}?", f"It is {n} + {n % 3}.", f"No idea, {n}."
        user = message("user", question)
        chosen, rejected = ([user, message("assistant", text)] for text in (better, worse))
        if data == "Anthropic/hh-rlhf":
            prompt = f"\n\nHuman: {question}\n\nAssistant: "
            rows.append({"chosen": prompt + better, "rejected": prompt + worse})
        elif data in ("HuggingFaceTB/smoltalk:all", "HuggingFaceTB/smol-smoltalk"):
            rows.append({"messages": [message("system", "Be brief."), *chosen, user, chosen[1]], "source": "x"})
        elif data == "HuggingFaceH4/cai-conversation-harmless":
            rows.append({"prompt": question, "messages": chosen, "chosen": chosen, "rejected": rejected})
        elif data in ("argilla/dpo-mix-7k", "trl-lib/ultrafeedback_binarized"):
            rows.append({"chosen": chosen, "rejected": rejected, "chosen_rating": 5.0, "rejected_rating": 3.0})
        else:
            ids = {"prompt": question, "prompt_id": str(n), "score_chosen": 8.0, "score_rejected": 6.5}
            rows.append({**ids, "messages": chosen, "chosen": chosen, "rejected": rejected})
    return rows


def write(path: pathlib.Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_sets_in_folders_of_their_own_are_one(tmp_path):
    """What constitutional_ai asks its user to do for lack of mixtures."""
    for folder, data, count in (("cai", CAI["data"], 3), ("chat", "HuggingFaceTB/smoltalk:all", 4)):
        write(tmp_path / folder / "data" / "train_sft-00000-of-00001.jsonl", rows_of(data, count))
        write(tmp_path / folder / "data" / "train_prefs-00000-of-00001.jsonl", rows_of(data, 9))
    records, dropped = read_records(tmp_path, split="train_sft", responses=("chosen",))
    assert (len(records), dropped) == (7, {})


def shrink(shape: dict, vocabulary: int) -> dict:
    """The same family with two layers (four where every fourth differs) and 32 units."""
    small = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
    small |= dict(num_hidden_layers=4 if "no_rope_layer_interval" in shape else 2, max_position_embeddings=128)
    return {**shape, **small, "vocab_size": vocabulary, **({"head_dim": 8} if "head_dim" in shape else {})}


LOG_2 = math.log(2)
# The loss where policy and reference are equal; of ORPO and SFT, where every token is about as likely as any.
FIRST = {
    "dpo": lambda hyper, vocabulary: LOG_2,
    "ipo": lambda hyper, vocabulary: (1 / (2 * hyper["tau"])) ** 2,
    "kto_pair": lambda hyper, vocabulary: 1.0,
    "apo_zero": lambda hyper, vocabulary: 1.0,
    "sft": lambda hyper, vocabulary: math.log(vocabulary),
    "orpo": lambda hyper, vocabulary: math.log(vocabulary) + hyper["lam"] * LOG_2,
}
SCAN = "handbook/beta_loss_scan.py"
# What differs from another in numbers alone needs no step of its own.
STEPPED = [name for name in PUBLISHED if not name.endswith(("M", "openhermes", "think,model=SFT")) and name != SCAN]
# Adapters on a quantized base, experts with ORPO, SFT, a window of every fourth layer: the others have nothing else.
CORE = ("handbook/zephyr_141b_orpo.py",)
IPO = {"loss.name": "ipo", "loss.tau": 0.1, "loss.per_token": True}
KTO = {"loss.name": "kto_pair", "loss.beta": 0.1}


@pytest.mark.parametrize(
    ("name", "overrides"),
    [pytest.param(name, {}, id=name, marks=[pytest.mark.everything] * (name not in CORE)) for name in STEPPED]
    + [
        longer(SCAN, IPO, id="scan-ipo"),
        longer(SCAN, KTO, id="scan-kto"),
    ],
)
def test_a_recipe_steps_at_reduced_width(name, overrides, tiny_tokenizer, light_runs, tmp_path):
    wanted, model = PUBLISHED[name], tmp_path / "model"
    tiny_tokenizer.save_pretrained(model)
    (model / "config.json").write_text(json.dumps(shrink(SHAPES[wanted.shape], len(tiny_tokenizer))))
    for split in filter(None, (wanted.split, wanted.test)):
        write(tmp_path / "data" / f"{split}-00000-of-00001.jsonl", rows_of(wanted.data, 16))

    c = recipe(name)
    c.model.path, c.data.path = str(model), str(tmp_path / "data")
    c.data.eval_path = c.data.eval_path and c.data.path
    c.data.eval_fraction = 0.5 if c.data.eval_fraction else 0.0  # 2% of 16 prompts are none
    c.model.random_init = True
    c.update_from_flattened_dict({"max_length": 96, "batch_size": 8, "log_steps": 1, **overrides})
    c.steps, c.epochs = 2, None
    c.micro_steps = min(c.micro_steps, 2)
    c.warmup_steps = min(c.warmup_steps, 1)
    if c.lora.rank:
        c.lora.rank = 4
    c.export.enabled = c.tensorboard = False
    result = train(c, tmp_path / "run")

    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and not result.stopped
    loss = read(c).loss
    first = FIRST[loss.name](loss.hyper, len(result.tokenizer))
    # The policy and its equal, the reference, round bfloat16 where XLA fuses them differently.
    exact = 1e-5 if c.dtype == "float32" else 1e-3
    assert rows[0]["loss"] == pytest.approx(first, rel=exact if "reference" in loss.needs else 0.02)
    assert all(0 < row["grad_norm"] < math.inf and math.isfinite(row["loss"]) for row in rows)
    assert max(row["learning_rate"] for row in rows) == pytest.approx(wanted.rate)
    assert bool(result.after) == bool(c.data.eval_path or c.data.eval_fraction)


# The page


def number(value: float) -> str:
    """1e-06 as 1e-6, 0.1 as it is."""
    return re.sub(r"e-0", "e-", f"{value:g}")


def line(name: str) -> str:
    """A recipe's line on the page."""
    c, (*_, devices) = recipe(name), PUBLISHED[name].batch
    loss = read(c).loss
    key = next((key for key in ("beta", "lam", "tau") if key in loss.hyper), None)
    named = f"{loss.name}, {key} {number(loss.hyper[key])}" if key else loss.name
    split = "" if c.data.split == "train" else f", {c.data.split}"
    warmup = (
        f"{number(c.warmup_epochs / c.epochs)} of the run" if c.warmup_epochs else f"{c.warmup_steps or 'no'} steps"
    )
    duration = f"{c.steps} steps" if c.steps else f"{number(c.epochs)} epoch{'s' if c.epochs > 1 else ''}"
    adapters = f", r {c.lora.rank}, alpha {number(c.lora.alpha)}, dropout {c.lora.dropout}" if c.lora.rank else ""
    weights = f"{c.model.quantize} + adapters{adapters}" if c.lora.rank else "all"
    rate = f"{c.optimizer.name} {number(c.learning_rate)}"
    mesh = f"fsdp={devices}" if c.mesh.fsdp == -1 else f"{devices} device"
    cells = [f"`{name}`", c.model.path, c.data.path + split, weights, named, rate, f"{c.schedule}, {warmup}"]
    cells += [f"{c.batch_size} / {c.micro_steps}", str(c.max_length), duration, mesh, f"{gigabytes(name):.1f}"]
    return f"| {' | '.join(cells)} |"


@variants
def test_the_page_has_the_recipe_with_its_numbers(name):
    assert line(name) in PAGE.splitlines(), f"docs/recipes.md needs the line\n{line(name)}"


def test_the_page_lists_no_other_recipe():
    listed = re.findall(r"^\| `((?:handbook|course)/[^`]+)` \|", PAGE, re.MULTILINE)
    assert set(listed) == set(PUBLISHED)
    for file in FILES:  # where it is from, and what differs
        (entry,) = re.findall(rf"^- `{file}`: (.*?)(?=^- |^$)", PAGE, re.MULTILINE | re.DOTALL)
        # The same commits as in its docstring.
        commits = [set(re.findall(r"\b(?=\w*\d)[0-9a-f]{7}\b", text)) for text in (entry, module_of(file).__doc__)]
        assert commits[0] == commits[1] != set(), file
