"""The package as a library: what `import prefalign_jax` offers, and what it says of mistakes."""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import json
import pathlib
import re
import subprocess
import sys
import types

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prefalign_jax as pa
import prefalign_jax.losses.dpo as dpo_module
from prefalign_jax import library, losses
from prefalign_jax.data.pairs import digest_of
from prefalign_jax.losses import LOSSES, Loss, dpo, make_loss
from prefalign_jax.types import PairLogps, UserError
from test_losses import draw

PACKAGE = pathlib.Path(pa.__file__).parent
MODEL = pathlib.Path(__file__).parent / "goldens" / "trl"
ROWS = [
    {"prompt": "Tell me about the garden.", "chosen": " It is black.", "rejected": " No."},
    {"prompt": "Is the bread brown?", "chosen": " Usually brown, near the harbour.", "rejected": " Who cares!"},
    {"prompt": "What is in the north?", "chosen": " A garden.", "rejected": " brown brown brown brown brown"},
    {"prompt": "Answer.", "chosen": " Yes, it is.", "rejected": " Maybe not."},
    {"prompt": "Tell me what the light looks like.", "chosen": " White.", "rejected": " It looks like it looks."},
]
SIDES = ("chosen", "rejected")
POLICY, REFERENCE = draw(6, dtype=np.float32)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_called_by_its_name(name):
    loss = make_loss(name)
    reference = REFERENCE if "reference" in loss.needs else None
    policy = POLICY._replace(running={key: jnp.float32(value) for key, value in loss.running.items()})
    values, metrics = getattr(losses, name)(POLICY, reference)
    expected, expected_metrics = loss(policy, reference)
    np.testing.assert_array_equal(values, expected)
    assert values.shape == (6,) and metrics.keys() == expected_metrics.keys()
    assert name in dir(losses)


def test_a_loss_and_the_module_of_its_name_are_one():
    assert isinstance(dpo_module, types.ModuleType) and dpo_module.ld_dpo and dpo_module is dpo is losses.dpo
    formula = -jax.nn.log_sigmoid(0.3 * (POLICY.chosen - REFERENCE.chosen - POLICY.rejected + REFERENCE.rejected))
    np.testing.assert_allclose(dpo(POLICY, REFERENCE, beta=0.3)[0], formula, rtol=1e-6)
    np.testing.assert_allclose(dpo_module.dpo(POLICY, REFERENCE, beta=0.3)[0], formula, rtol=1e-6)


def test_type_checkers_know_which_modules_can_be_called():
    tree = ast.parse(pathlib.Path(losses.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    both = {name for name in LOSSES if importlib.util.find_spec(f"prefalign_jax.losses.{name}")}
    assert {ast.unparse(node) for node in block.body} == {f"{name}: Call" for name in both} and "orpo" in both


@pytest.mark.parametrize("name", ["dpo", "ipo"])  # a module and a function
def test_jax_takes_a_loss_for_a_function(name):
    loss = getattr(losses, name)
    values, _ = jax.jit(loss)(POLICY, REFERENCE)
    np.testing.assert_allclose(values, loss(POLICY, REFERENCE)[0], rtol=1e-6)
    gradient = jax.grad(lambda policy: loss(policy, REFERENCE)[0].sum())(POLICY)
    assert (gradient.chosen != 0).all() and gradient.chosen == pytest.approx(-gradient.rejected)
    names = list(inspect.signature(loss).parameters)
    assert names[:2] == ["policy", "reference"] and "divergence" in names and loss is getattr(losses, name)


def test_a_loss_can_be_differentiated_in_its_hyper_parameters():
    def mean(beta):
        return losses.dpo(POLICY, REFERENCE, beta=beta)[0].mean()

    slope = (mean(0.101) - mean(0.099)) / 0.002
    np.testing.assert_allclose(jax.grad(mean)(0.1), slope, rtol=1e-3)
    assert mean(jnp.float32(0.1)) == mean(0.1)


def test_a_loss_fills_in_what_may_be_left_out():
    bare = PairLogps(*POLICY[:4])
    np.testing.assert_allclose(losses.aot(bare, REFERENCE)[0], losses.aot(POLICY, REFERENCE)[0], rtol=1e-6)
    moved = bare._replace(running={"mean_margin": jnp.float32(3.0)})
    assert not np.allclose(losses.beta_dpo(bare, REFERENCE)[0], losses.beta_dpo(moved, REFERENCE)[0])


def test_a_loss_of_ones_own_has_a_name_too(monkeypatch):
    monkeypatch.setitem(LOSSES, "mine", Loss(lambda policy, reference, *, scale=1.0: (scale * policy.chosen, {})))
    np.testing.assert_array_equal(losses.mine(POLICY, REFERENCE, scale=2.0)[0], 2 * POLICY.chosen)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: losses.dpo(POLICY, REFERENCE, bta=0.1), "no hyper-parameter 'bta'; did you mean 'beta'"),
        (lambda: losses.dpo(POLICY, REFERENCE, beta=-1.0), "beta=-1.0 is out of range; write a positive number"),
        (lambda: losses.dpo(POLICY, REFERENCE, beta=jnp.float32(-1)), "beta=-1.0 is out of range"),
        (lambda: losses.dpo(POLICY), "compares with a reference; give its PairLogps as the second argument"),
        (lambda: losses.dpo(POLICY.chosen, REFERENCE), "expected PairLogps as policy.*this is a ndarray"),
        (lambda: losses.dpo(POLICY, REFERENCE.chosen), "expected PairLogps as reference"),
        (lambda: losses.kto(PairLogps(*POLICY[:4]), REFERENCE), r"policy.label is None.*needs=\{'label'\}"),
    ],
)
def test_a_mistake_in_a_call_of_a_loss(call, says):
    with pytest.raises(UserError, match=says):
        call()


def test_a_loss_that_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'dppo'; did you mean 'dpo'"):
        losses.dppo  # noqa: B018


# The front door.


def test_the_package_is_imported_without_jax():
    code = (
        "import sys, prefalign_jax; print(*({'jax', 'numpy', 'transformers'} & sys.modules.keys()), dir(prefalign_jax))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("[") and "'tokenize'" in shown


def test_everything_offered_is_there_and_known_to_type_checkers():
    tree = ast.parse(pathlib.Path(pa.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert {alias.asname for node in block.body for alias in node.names} == set(pa.FACE) == set(pa.__all__[1:])
    assert all(callable(getattr(pa, name)) for name in pa.FACE if name != "losses")
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.parametrize("name", ["logps", "train", "experiment"])
def test_a_module_of_the_name_of_a_function_is_both(name):
    module = importlib.import_module(f"prefalign_jax.{name}")
    assert isinstance(module, types.ModuleType) and getattr(pa, name) is module
    function = getattr(importlib.import_module(f"prefalign_jax.{pa.FACE[name]}"), name)
    assert inspect.unwrap(module) is function and inspect.signature(module) == inspect.signature(function)


def test_what_is_not_offered_is_no_attribute():
    with pytest.raises(AttributeError, match="module 'prefalign_jax' has no attribute 'lode'"):
        pa.lode  # noqa: B018


# Configs.


def test_an_experiment_has_its_fields():
    config = pa.experiment("orpo", learning_rate=1, data={"path": pathlib.Path("d.jsonl")}, **{"loss.lam": 0.2})
    assert (config.loss.name, config.loss.lam, config.learning_rate) == ("orpo", 0.2, 1.0)
    assert config.data.path == "d.jsonl" and config.reference.kind == "none"
    assert pa.experiment(seed=np.int64(3)).seed == 3 and pa.experiment().loss.name == "dpo"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"learningrate": 1.0}, "no field 'learningrate'; did you mean 'learning_rate'"),
        ({"num_train_epochs": 3}, "no field 'num_train_epochs'; write epochs=3"),
        ({"beta": 0.1}, "no field 'beta'; write loss.beta;"),
        ({"shuffle": True}, "no field 'shuffle'; did you mean 'data.shuffle'"),
        ({"data.pth": "x"}, "no field 'data.pth'; did you mean 'data.path'"),
        ({"data": {"pth": "x"}}, "no field 'data.pth'"),
        ({"data": "x"}, "no field 'data'"),
        ({"steps": "ten"}, "steps='ten' is not of type int"),
        ({"loss": "dppo"}, "loss.name='dppo' is unknown; did you mean 'dpo'"),
    ],
)
def test_a_mistake_in_an_experiment(fields, says):
    with pytest.raises(UserError, match=re.escape(says)):
        pa.experiment(**fields)


@pytest.fixture(scope="module")
def policy():
    return pa.load(MODEL)


@pytest.fixture(scope="module")
def tokenizer():
    return pa.load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def pairs(tokenizer):
    return pa.tokenize(ROWS, tokenizer)


# Pairs.


def test_pairs_are_tokenized_in_the_order_of_the_rows(tokenizer, pairs):
    rows = [json.loads(line) for line in (MODEL / "pairs.jsonl").read_text().splitlines()]
    golden = pa.tokenize(MODEL / "pairs.jsonl", tokenizer)
    assert len(golden) == len(rows) == 64 and golden.dropped == {}
    for pair, row in zip(golden, rows, strict=True):
        for part in ("prompt", "chosen", "rejected"):
            assert getattr(pair, part).tolist() == row[f"{part}_ids"]
    assert pairs.texts(tokenizer)[1] == (ROWS[1]["prompt"], *(ROWS[1][side] + "<|im_end|>" for side in SIDES))
    assert [pair.where.row for pair in pairs] == [1, 2, 3, 4, 5] and str(pairs[0].where) == "data, row 1"
    assert (
        repr(pairs) == f"Pairs(5 pairs, {sum(len(x) for p in pairs for x in (p.prompt, p.chosen, p.rejected))} tokens)"
    )


def test_rows_in_memory_are_those_of_a_file(tokenizer, pairs, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for data in (file, str(file), datasets.Dataset.from_list(ROWS), tuple(ROWS)):
        assert digest_of(pa.tokenize(data, tokenizer, cache_dir="")) == digest_of(pairs)


def test_messages_are_decoded_with_their_template(tokenizer):
    chat = [{"role": "user", "content": "Is it white?"}]
    row = {"prompt": chat, "chosen": [{"role": "assistant", "content": "Yes."}]}
    row["rejected"] = [{"role": "assistant", "content": "No."}]
    (texts,) = pa.tokenize([row], tokenizer).texts(tokenizer)
    assert texts.prompt == tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert texts.chosen == "Yes." + tokenizer.eos_token


def test_the_loss_decides_what_is_wanted_of_a_row(tokenizer):
    scored = [{**row, "margin": float(i), "weight": 2.0} for i, row in enumerate(ROWS)]
    odpo = pa.tokenize(scored, tokenizer, loss="odpo")
    assert odpo.margin.tolist() == [0, 1, 2, 3, 4] and odpo.weight.tolist() == [2.0] * 5
    assert np.isnan(pa.tokenize(scored, tokenizer).margin).all()
    bound = make_loss("bradley_terry", margin=1.0)
    assert pa.tokenize(scored, tokenizer, loss=bound).margin.tolist() == [0, 1, 2, 3, 4]
    assert not pa.tokenize(ROWS, tokenizer, loss="sft").length[:, 2].any()
    kto = pa.tokenize(ROWS, tokenizer, loss="kto")
    assert kto.label.tolist() == [True, False] * 5
    assert kto[0].rejected.tolist() == kto[2].chosen.tolist()  # a completion of the next prompt


def test_what_gives_no_pair_is_counted(tokenizer):
    same = {"prompt": "A", "chosen": " b", "rejected": " b"}
    long = {"prompt": "A", "chosen": " brown" * 40, "rejected": " b"}
    pairs = pa.tokenize([*ROWS, same, long, ROWS[0]], tokenizer, max_length=40, clean="exact_duplicates")
    assert pairs.dropped == {"identical responses": 1, "too long": 1, "exact duplicate": 1} and len(pairs) == 5
    assert len(pa.tokenize([long], tokenizer, max_length=20, too_long="truncate_response")[0].chosen) < 20
    assert len(pa.tokenize(ROWS, tokenizer, limit=2)) == 2


def test_groups_give_pairs_or_stay_groups(tokenizer):
    rows = [{"prompt": "A", "responses": [" b", " c", " d"], "scores": [2, 3, 1]}]
    made = pa.tokenize(rows, tokenizer, pairs="all")
    assert len(made) == 3 and len(pa.tokenize(rows, tokenizer)) == 1
    (group,) = pa.tokenize(rows, tokenizer, loss="plackett_luce")
    assert group.scores == (3, 2, 1) and group.chosen.tolist() == made[0].chosen.tolist()


def test_every_field_of_data_is_an_option_or_about_training():
    training = {"path", "mix", "leaks", "shuffle", "balance", "layout", "row_length", "chat_template"}
    training |= {"group", "mean_over"}
    training |= {f"eval_{name}" for name in ("path", "split", "limit", "fraction", "seed")}
    assert {*pa.experiment().data} == training | {*library.OPTIONS} and not training & {*library.OPTIONS}


@pytest.mark.parametrize("columns", [{"prompt": "question", "chosen": "good"}, "prompt=question,chosen=good"])
def test_rows_may_call_things_otherwise(tokenizer, pairs, columns):
    rows = [{"question": row["prompt"], "good": row["chosen"], "rejected": row["rejected"]} for row in ROWS]
    assert digest_of(pa.tokenize(rows, tokenizer, columns=columns)) == digest_of(pairs)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda t: pa.tokenize(ROWS, t, max_length=4), "data: no pairs left, dropped 5 too long; max_length is 4"),
        (lambda t: pa.tokenize([], t), "data: no record is left (there was no row)"),
        (lambda t: pa.tokenize([{"prompt": "A", "chosen": 3, "rejected": "b"}], t), "data, row 1: field 'chosen'"),
        (lambda t: pa.tokenize([*ROWS, "row"], t), "data, row 6: expected a JSON object"),
        (lambda t: pa.tokenize(ROWS, t, loss="odpo"), "data, row 1: expected the field margin"),
        (lambda t: pa.tokenize({"prompt": ["A"]}, t), "data: expected a path, a hub name, a list of dicts or a"),
        (lambda t: pa.tokenize(datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)), t), "data['train']"),
        (lambda t: pa.tokenize("nowhere.jsonl", t), "nowhere.jsonl: no such file"),
        (lambda t: pa.tokenize(ROWS, str(MODEL)), "expected a tokenizer, this is a str; write load_tokenizer(path)"),
        (lambda t: pa.tokenize(ROWS, t, limt=3), "no option 'limt'; did you mean 'limit'"),
        (lambda t: pa.tokenize(ROWS, t, chat_template="chatml"), "write load_tokenizer(path, chat_template=...)"),
        (lambda t: pa.tokenize(ROWS, t, split="test"), "split applies to a directory or a hub name"),
        (lambda t: pa.tokenize(ROWS, t, limit="two"), "data.limit='two' is not of type int"),
        (lambda t: pa.tokenize(ROWS, t, max_length=None), "max_length=None must be a number of tokens"),
        (lambda t: pa.tokenize(ROWS, t, loss="dppo"), "did you mean 'dpo'"),
        (lambda t: pa.tokenize(ROWS, t, too_long="cut"), "too_long='cut' is unknown"),
        (lambda t: pa.load_tokenizer("./nowhere"), "no such tokenizer directory"),
    ],
)
def test_a_mistake_about_data(tokenizer, call, says):
    with pytest.raises(UserError, match=re.escape(says)):
        call(tokenizer)


# Models and log-probabilities.


def naive(policy, prompt, response) -> float:
    """The log-probability of a response, from the logits of its whole text."""
    text = np.concatenate([prompt, response])
    ids = np.pad(text, (0, 64 - len(text)))[None]  # what comes after changes nothing, and one shape is compiled
    places = np.arange(ids.size)[None]
    hidden = policy.model.hidden(policy.params, ids, places, np.ones_like(ids), np.zeros_like(ids))[0]
    table = jax.nn.log_softmax(hidden @ policy.model.head(policy.params).T)
    return float(sum(table[len(prompt) - 1 + i, token] for i, token in enumerate(response)))


def test_log_probabilities_are_in_the_order_of_the_pairs(policy, pairs, monkeypatch):
    monkeypatch.setattr(library, "AT_ONCE", 3)  # several batches, the last one filled up
    logps = pa.logps(policy, pairs)
    assert len(pairs) == 5
    for i, pair in enumerate(pairs):
        np.testing.assert_allclose(logps.chosen[i], naive(policy, pair.prompt, pair.chosen), rtol=1e-4)
        np.testing.assert_allclose(logps.rejected[i], naive(policy, pair.prompt, pair.rejected), rtol=1e-4)
    np.testing.assert_array_equal(logps.chosen_tokens, [len(pair.chosen) for pair in pairs])
    np.testing.assert_allclose(logps.mean_tokens[1], np.mean([len(pair.chosen) for pair in pairs]), rtol=1e-6)
    np.testing.assert_allclose(pa.logps(policy, pairs[3:]).chosen, logps.chosen[3:], rtol=1e-5)
    np.testing.assert_allclose(pa.logps(policy, list(pairs)).chosen, logps.chosen, rtol=1e-6)


def test_log_probabilities_can_be_differentiated_and_jitted(policy, pairs):
    reference = pa.logps(policy, pairs)

    def mean_loss(params):
        return losses.dpo(pa.logps(policy._replace(params=params), pairs), reference)[0].mean()

    value, gradient = jax.value_and_grad(mean_loss)(policy.params)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-5)
    jitted, the_same = jax.jit(jax.value_and_grad(mean_loss))(policy.params)
    np.testing.assert_allclose(jitted, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), the_same, gradient)
    step = 3.0 / sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradient)) * 1e-3
    moved = mean_loss(jax.tree.map(lambda p, g: p - step * g, policy.params, gradient))
    np.testing.assert_allclose(value - moved, 3e-3, rtol=0.05)


def test_what_a_loss_needs_is_there_and_nothing_that_the_pairs_lack(policy, pairs):
    plain = pa.logps(policy, pairs)
    assert plain.prompt is plain.margin is plain.shared is plain.label is None
    full = pa.logps(policy, pairs, needs=make_loss("orpo", nll_over="text", nll_mean="batch", extra_eos=True).needs)
    np.testing.assert_allclose(full.prompt[0], naive(policy, pairs[0].prompt[:1], pairs[0].prompt[1:]), rtol=1e-4)
    assert np.isfinite(losses.orpo(full, nll_over="text", nll_mean="batch", extra_eos=True)[0]).all()
    with pytest.raises(
        UserError, match=r"reads the data's score gap, and policy.margin is None; tokenize with loss='odpo'"
    ):
        losses.odpo(plain, plain)
    with pytest.raises(UserError, match=r"policy.label is None; tokenize with loss='kto'"):
        losses.kto(plain, plain)


def test_divergences_of_whole_distributions_take_both_models(policy, pairs):
    other = policy._replace(params=jax.tree.map(lambda x: 1.1 * x, policy.params))
    reference = pa.logps(policy, pairs)
    moved = pa.logps(other, pairs, needs={"token_kl"}, reference=policy)
    still = pa.logps(policy, pairs, needs={"token_kl"}, reference=policy)
    assert (moved.token_kl.chosen > 0.01).all() and np.abs(still.token_kl.chosen).max() < 1e-4
    assert np.isfinite(losses.tdpo2(moved, reference)[0]).all()


def test_a_policy_may_lie_on_a_mesh(policy, pairs):
    spread = pa.load(str(MODEL), mesh={"data": 2, "fsdp": 4})
    assert len(jax.tree.leaves(spread.params)[0].sharding.device_set) == 8
    expected = pa.logps(policy, pairs)
    np.testing.assert_allclose(pa.logps(spread, pairs).chosen, expected.chosen, rtol=1e-4)

    def mean(params):
        return pa.logps(spread._replace(params=params), pairs).chosen.mean()

    value, gradient = jax.jit(jax.value_and_grad(mean))(spread.params)
    np.testing.assert_allclose(value, expected.chosen.mean(), rtol=1e-5)


def test_a_policy_computes_in_bfloat16(policy, pairs):
    half = pa.load(MODEL, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(half.params)} == {np.dtype("float32")}
    difference = np.abs(pa.logps(half, pairs).chosen - pa.logps(policy, pairs).chosen)
    assert 1e-4 < difference.max() < 2


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda policy, pairs: pa.load(3), "load: expected a directory or a hub name, this is a int"),
        (lambda policy, pairs: pa.load("./nowhere"), "no such directory"),
        (lambda policy, pairs: pa.load(MODEL, dtype="float16"), "dtype='float16' is unknown"),
        (lambda policy, pairs: pa.load(MODEL, mesh={"fdsp": 1}), "mesh.fdsp is unknown"),
        (lambda policy, pairs: pa.logps(policy.params, pairs), "logps: expected a Policy"),
        (lambda policy, pairs: pa.logps(policy, ROWS), "logps: expected pairs, as tokenize gives them"),
        (lambda policy, pairs: pa.logps(policy, pairs[:0]), "logps: there is no pair"),
        (lambda policy, pairs: pa.logps(policy, pairs, needs="prompt"), "write needs={'prompt'}"),
        (lambda policy, pairs: pa.logps(policy, pairs, needs=["promt"]), "did you mean 'prompt'"),
        (lambda policy, pairs: pa.logps(policy, pairs, needs=["reward"]), "the policy is a language model"),
        (lambda policy, pairs: pa.logps(policy, pairs, needs=["token_kl"]), "reference=POLICY go together"),
        (lambda policy, pairs: pa.logps(policy, [beyond(pairs[0])]), "token 600 is beyond the model's 512"),
        (lambda policy, pairs: pa.logps(policy, [much(pairs[0])]), "its 613 tokens exceed the model's 512 positions"),
    ],
)
def test_a_mistake_about_a_model(policy, pairs, call, says):
    with pytest.raises(UserError, match=re.escape(says)):
        call(policy, pairs)


def beyond(pair):
    return dataclasses.replace(pair, chosen=np.array([600, 1], np.int32))


def much(pair):
    return dataclasses.replace(pair, prompt=np.full(600, 7, np.int32), chosen=np.full(13, 8, np.int32))


def test_weights_are_read_in_one_place():
    readers = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if re.search(r"hf_io(\.| import [\w\s,(]*\b)load_params\b", path.read_text(encoding="utf-8"))
    ]
    assert readers == ["models/loading.py"]


# Samples.


def test_samples_are_texts_by_prompt(policy):
    chat = [{"role": "user", "content": "Hi"}]
    texts = pa.sample(policy, ["The garden is", chat], n=3, max_new_tokens=6)
    assert [len(several) for several in texts] == [3, 3] and len({*texts[0]}) > 1
    assert texts == pa.sample(policy, ["The garden is", chat], n=3, max_new_tokens=6)
    assert texts != pa.sample(policy, ["The garden is", chat], n=3, max_new_tokens=6, seed=1)
    likeliest = pa.sample(policy, ["The garden is"], n=2, temperature=0, max_new_tokens=6)[0]
    assert likeliest[0] == likeliest[1]
    cut = likeliest[0][2:4]
    assert pa.sample(policy, ["The garden is"], temperature=0, max_new_tokens=6, stop=[cut]) == [
        [likeliest[0][: likeliest[0].index(cut)]]
    ]


@pytest.mark.parametrize(
    ("prompts", "options", "says"),
    [
        ("Hi", {}, "sample: expected a list of prompts, this is a str; write [prompt]"),
        ([3], {}, "sample: prompt 1 is neither a string nor a list of messages"),
        (["Hi", [{"content": "Hi"}]], {}, "sample: prompt 2 is neither"),
        (["Hi"], {"stop": "x"}, "stop='x' must be a list of texts"),
        (["Hi"], {"temperature": -1}, "temperature=-1 is out of range"),
        (["Hi"], {"max_new_tokens": 600}, "exceed the model's 512 positions"),
    ],
)
def test_a_mistake_in_sampling(policy, prompts, options, says):
    with pytest.raises(UserError, match=re.escape(says)):
        pa.sample(policy, prompts, **options)


# Training, and what the pages show.


def blocks(page: str, after: str = "") -> str:
    """The Python of a page, where MODEL stands for a model that is here."""
    text = (pathlib.Path(__file__).parents[1] / page).read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```", text[text.index(after) :], re.DOTALL | re.MULTILINE)
    return "\n".join(code[:1] if after else code).replace('"MODEL"', repr(str(MODEL)))


def test_the_ten_lines_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown: dict = {}
    code = blocks("README.md", "<!-- library -->")
    exec(code, shown)
    np.testing.assert_allclose(shown["value"], np.log(2), rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(shown["gradient"]))
    assert shown["result"].step == 10 and (tmp_path / "runs" / "two_rows" / "export" / "config.json").exists()
    assert len(code.strip().splitlines()) <= 13 and pa.load(tmp_path / "runs" / "two_rows").model


@pytest.mark.everything
def test_the_page_on_the_library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown: dict = {}
    exec(blocks("docs/library.md"), shown)
    np.testing.assert_allclose(shown["value"], np.log(2), rtol=1e-5)
    assert np.isfinite(shown["values"]).all() and shown["result"].params
