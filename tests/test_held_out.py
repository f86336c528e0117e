import csv
import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefalign_jax import commands
from prefalign_jax.data.chat import load_tokenizer, tokenize_records
from prefalign_jax.data.pipeline import make_pair_set
from prefalign_jax.data.records import Record, read_records
from prefalign_jax.data.trees import Layout
from prefalign_jax.evaluation.held_out import (
    by_slice,
    changes,
    displacement,
    evaluate,
    intervals,
    prompt_numbers,
    response_logps,
    sequence_log_ratios,
    set_logps,
    slice_labels,
    summary,
)
from prefalign_jax.export import export
from prefalign_jax.intervals import bootstrap_mean, share_interval, wilson
from prefalign_jax.losses import make_loss
from prefalign_jax.models.decoder import make_decoder
from prefalign_jax.models.hf_io import load_config
from prefalign_jax.train_step import make_eval_step
from prefalign_jax.types import LanguageModel, Pair, PairLogps, Place, UserError
from small import MODEL, make_pairs, make_params

ROOT = pathlib.Path(__file__).parents[1]
PARAMS, REFERENCE = make_params(0), make_params(1)


def weighted_pairs(count: int):
    weights = np.random.default_rng(5).uniform(0.5, 2.0, count)
    return [
        p.__class__(p.prompt, p.chosen, p.rejected, float(w)) for p, w in zip(make_pairs(count), weights, strict=True)
    ]


PAIRS = weighted_pairs(10)
DATA = make_pair_set(PAIRS, 4)
DATA = DATA._replace(shapes=DATA.shapes[-1:])  # one shape: one program


@jax.jit
def _all_logps(params, tokens, lengths):
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = (places < lengths[:, None]).astype(jnp.int32)
    hidden = MODEL.hidden(params, tokens, places, segments, jnp.zeros_like(tokens))
    logps = jax.nn.log_softmax(jnp.einsum("rld,vd->rlv", hidden, MODEL.head(params)))
    return jnp.take_along_axis(logps[:, :-1], tokens[:, 1:, None], axis=2)[..., 0]


@functools.cache
def plain_token_logps(which: str) -> list[np.ndarray]:
    """Log-probabilities of the tokens of chosen, rejected, chosen, ..., every response in a row of its own."""
    sequences = [(p.prompt, response) for p in PAIRS for response in (p.chosen, p.rejected)]
    tokens, lengths = np.zeros((len(sequences), 24), np.int32), []
    for row, (prompt, response) in zip(tokens, sequences, strict=True):
        text = np.concatenate([prompt, response])
        row[: len(text)] = text
        lengths.append(len(text))
    logps = np.asarray(_all_logps({"policy": PARAMS, "reference": REFERENCE}[which], tokens, np.array(lengths)))
    return [
        row[len(prompt) - 1 : len(prompt) + len(response) - 1]
        for row, (prompt, response) in zip(logps, sequences, strict=True)
    ]


def plain_logps(which: str) -> np.ndarray:
    """[pairs, 2] their sums."""
    return np.array([tokens.sum() for tokens in plain_token_logps(which)]).reshape(-1, 2)


# evaluate


def test_every_pair_is_seen_once_and_in_order():
    """Ten pairs in batches of four: the last batch is half filler."""
    sizes = []

    def step(params, reference, batch):
        sizes.append(batch.weight.shape)
        number = batch.index[0].astype(np.float32)
        record = PairLogps(*np.stack([number - 100, np.full(4, params + reference), number, number]))
        return record._replace(weight=batch.weight[0], mean_tokens=batch.mean_tokens[0]), None

    columns = evaluate(step, make_loss("slic"), 3, 4, DATA)
    np.testing.assert_array_equal(columns["logps/chosen"], np.arange(10) - 100)
    np.testing.assert_array_equal(columns["logps/rejected"], np.full(10, 7))
    np.testing.assert_allclose(columns["weight"], [pair.weight for pair in PAIRS], rtol=1e-6)
    assert sizes == [(1, 4)] * 3


def values_of(name: str, data=DATA, running=None, **hyper):
    loss = make_loss(name, **hyper)
    return evaluate(make_eval_step(MODEL, loss), loss, PARAMS, REFERENCE, data, running)


def test_members_read_a_set_at_once_as_each_does_alone():
    loss, params = make_loss("dpo"), [PARAMS, REFERENCE]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *params)
    both = set_logps(make_eval_step(MODEL, loss, members=True), stacked, REFERENCE, DATA, members=True)
    for k, own in enumerate(params):
        alone = set_logps(make_eval_step(MODEL, loss), own, REFERENCE, DATA)
        one = jax.tree.map(lambda x, k=k: x[k], both)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), one, alone)


@pytest.mark.parametrize("name", ["aot", "kto_pair"])
def test_what_a_pair_is_compared_with_is_the_whole_set_whatever_the_batches(name):
    one, other = (values_of(name, make_pair_set(PAIRS, size)) for size in (4, 10))
    for key, values in one.items():
        np.testing.assert_allclose(other[key], values, rtol=1e-4, atol=1e-5, err_msg=key)


def test_evaluation_reads_what_the_loss_carries_and_does_not_advance_it():
    running = {"shift": np.float32(0.7), "steps": np.float32(3.0)}
    np.testing.assert_array_equal(values_of("bco", running=running)["bco_shift"], np.float32(0.7))


def test_columns_equal_the_formula_of_each_pair_alone():
    columns = values_of("dpo", beta=0.3)
    policy, reference = plain_logps("policy"), plain_logps("reference")
    reward = 0.3 * (policy - reference)
    margin = reward[:, 0] - reward[:, 1]
    expected = {
        "loss": np.log1p(np.exp(-margin)),
        "rewards/margins": margin,
        "rewards/accuracies": margin > 0,
        "logps/chosen": policy[:, 0],
        "logps/rejected": policy[:, 1],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(columns[name], values, rtol=2e-4, atol=2e-5, err_msg=name)
    assert 0 < margin[margin > 0].size < 10, "the accuracy is put to no test"


def test_the_mean_over_batches_is_the_mean_over_tokens():
    """-sum_i w_i log pi(chosen_i) / sum_i w_i |chosen_i|, though the batches hold different numbers of tokens."""
    found = summary(values_of("sft", mean="batch"))
    weight = np.array([pair.weight for pair in PAIRS])
    tokens = np.array([len(pair.chosen) for pair in PAIRS])
    expected = -(weight * plain_logps("policy")[:, 0]).sum() / (weight * tokens).sum()
    np.testing.assert_allclose(found["eval/loss"], expected, rtol=1e-4)


# summary


def test_means_are_weighted():
    columns = {"loss": np.array([1.0, 5.0]), "weight": np.array([3.0, 1.0])}
    assert summary(columns) == {"eval/loss": 2.0}
    assert summary(columns, prefix="test/") == {"test/loss": 2.0}


def test_only_the_ratio_of_the_weights_matters():
    rng = np.random.default_rng(0)
    columns = {"rewards/accuracies": rng.random(20).round(), "loss": rng.random(20), "weight": rng.random(20)}
    found, scaled = summary(columns), summary({**columns, "weight": 7 * columns["weight"]})
    assert found.keys() == {f"eval/{n}" for n in ("loss", *(f"rewards/accuracies{e}" for e in ("", "_low", "_high")))}
    assert found == pytest.approx(scaled)


def test_a_pair_of_weight_zero_counts_nothing_not_even_nan():
    columns = {"rewards/accuracies": np.array([1.0, 0.0, 1.0]), "weight": np.ones(3)}
    more = {"rewards/accuracies": np.array([1.0, 0.0, 1.0, np.nan]), "weight": np.array([1.0, 1.0, 1.0, 0.0])}
    assert summary(columns) == pytest.approx(summary(more))


def test_a_metric_is_averaged_over_the_pairs_it_applies_to_and_a_loss_over_all():
    columns = {"loss": np.array([1.0, 3.0]), "kl": np.array([5.0, np.nan]), "none": np.full(2, np.nan)}
    found = summary({**columns, "weight": np.ones(2)})
    assert (found["eval/loss"], found["eval/kl"]) == (2.0, 5.0) and np.isnan(found["eval/none"])
    assert np.isnan(summary({"loss": np.array([1.0, np.nan]), "weight": np.ones(2)})["eval/loss"])  # it diverged


def test_equal_weights_give_the_interval_of_their_number():
    columns = {"rewards/accuracies": np.repeat([1.0, 0.0], [30, 10]), "weight": np.full(40, 0.25)}
    found = summary(columns)
    bounds = found["eval/rewards/accuracies_low"], found["eval/rewards/accuracies_high"]
    np.testing.assert_allclose(bounds, wilson(0.75, 40), rtol=1e-6)


# The interval


def test_the_interval_covers_under_unequal_weights_too():
    """Weights as unequal as these make 300 pairs worth 110; an interval for 300 would cover some 75%."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(2000):
        columns = {"rewards/accuracies": (rng.random(300) < 0.7).astype(float), "weight": rng.lognormal(size=300)}
        found = summary(columns)
        covered += found["eval/rewards/accuracies_low"] <= 0.7 <= found["eval/rewards/accuracies_high"]
    assert 0.93 < covered / 2000 < 0.97


# Intervals, changes, slices


def columns_for(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    margins = rng.normal(0.5, 1.0, count)
    return {
        "loss": np.log1p(np.exp(-margins)),
        "rewards/accuracies": (margins > 0).astype(float),
        "rewards/margins": margins,
        "weight": rng.uniform(0.5, 2.0, count),
    }


def test_prompts_are_told_apart_by_their_tokens():
    pairs = [Pair(np.array(ids), np.ones(1), np.ones(1)) for ids in ([1, 2], [1], [1, 2], [2, 1])]
    assert prompt_numbers(pairs).tolist() == [0, 1, 0, 2]


def test_intervals_are_those_of_the_weighted_means():
    columns, prompts = columns_for(60), np.arange(60) // 2
    found = intervals(columns, prompts)
    assert found.keys() == columns.keys() - {"weight"}
    for name in ("loss", "rewards/margins"):
        assert found[name] == bootstrap_mean(columns[name], columns["weight"], clusters=prompts)
    assert {f"eval/{name}": value.mean for name, value in found.items()} == pytest.approx(
        {name: value for name, value in summary(columns).items() if not name.endswith(("_low", "_high"))}
    )


def test_a_pair_measured_twice_under_its_prompt_is_one_observation():
    columns, prompts = columns_for(40), np.arange(40)
    once = intervals(columns, prompts)
    twice = intervals({name: np.repeat(values, 2) for name, values in columns.items()}, np.repeat(prompts, 2))
    for name, value in once.items():
        np.testing.assert_allclose(twice[name], value, rtol=1e-6)
        alone = intervals({n: np.repeat(v, 2) for n, v in columns.items()}, np.arange(80))[name]
        assert alone.high - alone.low < 0.8 * (value.high - value.low)


def test_what_says_too_little_has_no_interval():
    columns = columns_for(10) | {"none": np.full(10, np.nan)}
    found = intervals(columns, np.arange(10))
    assert found["loss"].mean == pytest.approx(np.average(columns["loss"], weights=columns["weight"]))
    assert np.isnan(found["loss"].low) and np.isnan(found["none"].mean)
    assert found["rewards/accuracies"].low < found["rewards/accuracies"].mean < found["rewards/accuracies"].high
    diverged = intervals(columns | {"loss": np.where(np.arange(10) == 3, np.nan, 1.0)}, np.arange(10))["loss"]
    assert np.isnan(diverged.mean)


@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
def test_the_interval_of_a_share_covers_where_pairs_share_a_prompt(share):
    """Three pairs a prompt that agree four times in five: taken for independent, some 85% would be covered."""
    rng, covered = np.random.default_rng(0), 0
    prompts = np.repeat(np.arange(100), 3)
    for _ in range(1000):
        common = np.repeat(rng.random(100) < share, 3)
        right = np.where(rng.random(300) < 0.8, common, rng.random(300) < share)
        _, low, high = share_interval(right, rng.uniform(0.8, 1.2, 300), prompts)
        covered += low <= share <= high
    assert 0.92 < covered / 1000 < 0.98


def test_few_prompts_with_pairs_that_agree_leave_more_doubt():
    """Six prompts of five pairs each: their own variance, estimated from six numbers, would cover some 90%."""
    rng, covered, prompts = np.random.default_rng(0), 0, np.repeat(np.arange(6), 5)
    for _ in range(1000):
        right = np.where(rng.random(30) < 0.8, np.repeat(rng.random(6) < 0.7, 5), rng.random(30) < 0.7)
        _, low, high = share_interval(right, clusters=prompts)
        covered += low <= 0.7 <= high
    assert covered / 1000 > 0.93


def test_a_change_is_measured_on_the_same_pairs():
    before, prompts = columns_for(200), np.arange(200)
    shift = np.random.default_rng(1).normal(0.1, 0.01, 200)
    after = before | {"rewards/margins": before["rewards/margins"] + shift}
    found = changes(after, before, prompts)
    np.testing.assert_allclose(found["rewards/margins"].mean, np.average(shift, weights=before["weight"]), rtol=1e-6)
    assert found["rewards/margins"].low > 0.09  # though the margins themselves are ten times as wide
    assert found["loss"] == (0, 0, 0)
    assert "weight" not in found


def test_slices_add_up_to_the_whole():
    columns, prompts = columns_for(200), np.arange(200) // 2
    labels = {"a": list("xyz" * 66 + "xx"), "b": ["all"] * 200}
    found = by_slice(columns, prompts, labels)
    whole = intervals(columns, prompts)
    assert list(found["a"]) == ["x", "y", "z"]
    for parts in found.values():
        assert sum(part.pairs for part in parts.values()) == 200
        assert sum(part.share for part in parts.values()) == pytest.approx(1)
        for name, value in whole.items():
            together = sum(part.share * part.metrics[name].mean for part in parts.values())
            assert together == pytest.approx(value.mean)
    assert found["b"]["all"].metrics == whole


FIRST = Place("f.jsonl", 1)


def made(prompt, chosen=1, rejected=1, where=FIRST, label=True, **columns):
    """A record and its pair, with so many tokens."""
    record = Record(prompt, "c", "r", where=where, columns=tuple(columns.items()))
    return record, Pair(np.ones(1), np.ones(chosen), np.ones(rejected), label=label, where=where)


def labels_of(*items, **options):
    records, pairs = zip(*items, strict=True)
    return slice_labels(pairs, records, **options)


def test_length_slices_have_a_tenth_of_the_longer_response_as_their_border():
    sizes = [(10, 9), (9, 10), (10, 8), (8, 10), (100, 90), (100, 89), (5, 5), (1, 2)]
    items = [made("p", *size, where=Place("f", i)) for i, size in enumerate(sizes)]
    near, long, short = "within 10%", "chosen longer", "chosen shorter"
    assert labels_of(*items)["length"] == [near, near, long, short, near, long, near, short]


def test_turns_are_those_of_the_user():
    chat = [{"role": role, "content": "x"} for role in ("system", "user", "assistant", "user")]
    transcript = "\n\nHuman: a\n\nAssistant: b" * 6
    items = [made(prompt, where=Place("f", i)) for i, prompt in enumerate(["p", chat, transcript])]
    assert labels_of(*items)["turns"] == ["1", "2", "5 or more"]


def test_files_columns_and_labels_make_slices():
    items = [
        made("p", where=Place("a.jsonl", 1), source="x", good=True),
        made("q", where=Place("b.jsonl", 1), source=None, good=False, label=False),
    ]
    found = labels_of(*items, kind="completions")
    assert found["file"] == ["a.jsonl", "b.jsonl"]
    assert found["source"] == ["x", "(none)"]
    assert found["good"] == ["True", "False"]
    assert found["label"] == ["desirable", "undesirable"]
    assert "length" not in found
    assert "file" not in labels_of(items[0])


def test_a_column_that_is_different_everywhere_is_refused():
    items = [made("p", where=Place("f", i), id=i) for i in range(60)]
    with pytest.raises(UserError, match="'id' has 60 values"):
        labels_of(*items)


def test_columns_of_the_rows_reach_the_slices(tmp_path, tiny_tokenizer):
    rows = [{"prompt": "p", "chosen": f"c{i}", "rejected": "r", "source": "xy"[i % 2]} for i in range(5)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records, _ = read_records(tmp_path / "d.jsonl", columns=["source"])
    pairs, _ = tokenize_records(records, tiny_tokenizer, max_length=32)
    assert slice_labels(pairs[1:], records)["source"] == ["y", "x", "y", "x"]
    with pytest.raises(UserError, match="no row has the field 'from'"):
        read_records(tmp_path / "d.jsonl", columns=["from"])
    (tmp_path / "d.jsonl").write_text(json.dumps(rows[0] | {"source": ["x"]}))
    with pytest.raises(UserError, match=r"row 1: field 'source': expected a string, a number or a truth value"):
        read_records(tmp_path / "d.jsonl", columns=["source"])


# Displacement


@pytest.mark.parametrize("seed", range(5))
def test_displacement_equals_a_loop(seed):
    rng = np.random.default_rng(seed)
    policy, reference = -rng.exponential(20, (2, 50))
    weight = rng.integers(1, 4, 50).astype(float)
    falls = []
    for p, r, w in zip(policy, reference, weight, strict=True):
        falls += [r - p] * int(w) if p < r else []
    found = displacement(policy, reference, weight, np.arange(50))
    assert found.responses == 50
    assert found.fell.mean == pytest.approx(len(falls) / weight.sum())
    assert found.change.mean == pytest.approx(np.average(policy - reference, weights=weight))
    assert (found.mean, found.worst) == pytest.approx((np.mean(falls), max(falls)))
    assert found.median == pytest.approx(sorted(falls)[(len(falls) - 1) // 2])


def test_displacement_of_a_model_from_itself_is_none():
    same = -np.arange(30.0)
    found = displacement(same, same, np.ones(30), np.arange(30))
    assert (found.fell.mean, found.change, found.mean, found.worst) == (0, (0, 0, 0), 0, 0)


def test_responses_of_weight_zero_are_not_displaced():
    policy, reference = np.array([-9.0] + [-1.0] * 30), np.full(31, -2.0)
    found = displacement(policy, reference, np.array([0.0] + [1.0] * 30), np.arange(31))
    assert (found.responses, found.fell.mean, found.worst) == (30, 0, 0)


# Single tokens


@pytest.mark.parametrize(
    ("layout", "group"),
    [(Layout(), False), (Layout(), True), (Layout(tree=False), True), (Layout(prompt=True, after=True), False)],
)
def test_every_token_has_its_own_log_probability(layout, group):
    """Ten pairs in batches of four, against a model that sees one response a row."""
    found = response_logps(MODEL, PARAMS, make_pair_set(PAIRS, 4, layout=layout, group=group))
    assert len(found) == 10
    for side, expected in enumerate(plain_token_logps("policy")):
        np.testing.assert_allclose(found[side // 2][side % 2], expected, rtol=2e-4, atol=2e-5)


def test_the_tokens_of_a_response_sum_to_what_the_loss_reads():
    data = make_pair_set(PAIRS, 4, groups=2)
    columns = values_of("dpo")
    for pair, tokens in enumerate(response_logps(MODEL, PARAMS, data)):
        sums = tokens.chosen.sum(), tokens.rejected.sum()
        np.testing.assert_allclose(sums, (columns["logps/chosen"][pair], columns["logps/rejected"][pair]), rtol=1e-5)


def test_of_a_group_the_first_two_responses_have_their_log_probabilities():
    others = [tuple(other.chosen for other in PAIRS[: i % 3]) for i in range(len(PAIRS))]
    wider = [
        dataclasses.replace(pair, others=more, scores=tuple(range(2 + len(more), 0, -1)))
        for pair, more in zip(PAIRS, others, strict=True)
    ]
    found = response_logps(MODEL, PARAMS, make_pair_set(wider, 4, layout=Layout(group=True), group=False))
    for pair, tokens in zip(response_logps(MODEL, PARAMS, make_pair_set(PAIRS, 4)), found, strict=True):
        np.testing.assert_allclose(tokens.chosen, pair.chosen, rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(tokens.rejected, pair.rejected, rtol=2e-4, atol=2e-5)


def test_pairs_without_a_rejected_response_have_no_tokens_there():
    found = response_logps(MODEL, PARAMS, make_pair_set(PAIRS, 4, layout=Layout(rejected=False)))
    assert [len(tokens.chosen) for tokens in found] == [len(pair.chosen) for pair in PAIRS]
    assert {len(tokens.rejected) for tokens in found} == {0}


# KL


def table_model() -> LanguageModel:
    """Next-token logits are a row of a table: those of the token before."""
    return LanguageModel("table", None, lambda params, tokens, *rest: params["t"][tokens], lambda params: jnp.eye(4))


def test_log_ratios_of_samples_average_to_the_kl_divergence():
    """E_policy of the estimate over all responses of at most 3 tokens, 0 ending one, is the chain rule's KL."""
    model, start, end, limit = table_model(), 3, 0, 3
    tables = [np.random.default_rng(seed).normal(size=(4, 4)).astype(np.float32) for seed in (0, 1)]
    probabilities = [np.exp(t) / np.exp(t).sum(1, keepdims=True) for t in tables]

    def kl(state: int, left: int) -> float:
        ours, theirs = (p[state].astype(np.float64) for p in probabilities)
        now = (ours * np.log(ours / theirs)).sum()
        return now + (sum(ours[s] * kl(s, left - 1) for s in range(4) if s != end) if left > 1 else 0.0)

    responses, chances = [], []

    def extend(response: list[int], chance: float) -> None:
        if response and (response[-1] == end or len(response) == limit):
            responses.append(response)
            chances.append(chance)
            return
        for token in range(4):
            extend([*response, token], chance * probabilities[0][(response or [start])[-1], token])

    extend([], 1.0)
    samples = [Pair(np.array([start], np.int32), np.array(r, np.int32), np.zeros(0, np.int32)) for r in responses]
    policy, reference = ((model, {"t": jnp.asarray(table)}) for table in tables)
    found = sequence_log_ratios(policy, reference, samples, batch_size=16)
    assert sum(chances) == pytest.approx(1, abs=1e-5)
    assert (found < 0).any()
    np.testing.assert_allclose((np.array(chances) * found).sum(), kl(start, limit), rtol=1e-4)
    np.testing.assert_array_equal(sequence_log_ratios(policy, policy, samples), 0)


# The script


TRL = ROOT / "tests/goldens/trl"
FILES = {"evaluation.json", "slices.csv", "margins.png", "tokens.html"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model after ten steps of DPO, as the working directory of a run has it."""
    directory = tmp_path_factory.mktemp("run")
    shutil.copytree(TRL, directory / "export", ignore=shutil.ignore_patterns("*.safetensors", "*.jsonl"))
    shutil.copy(TRL / "final_dpo.safetensors", directory / "export/model.safetensors")
    return directory


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """24 pairs, two topics, with hostile text in one."""
    path = tmp_path_factory.mktemp("data") / "held_out.jsonl"
    rows = [json.loads(line) for line in (TRL / "pairs.jsonl").read_text().splitlines()[:24]]
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    rows = [row | {"topic": "odd" if i % 2 else "even"} for i, row in enumerate(rows)]
    rows[0]["chosen"] = " <script>alert('é 👧')</script>"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def measured(tmp_path, capsys, launch_leaves_no_trace):
    """measured(**options) -> (status, stdout, stderr, the directory of its files) of `prefalign evaluate`."""

    def run(**options):
        given = {"out": tmp_path / "out", "batch_size": 8, "examples": 2} | options
        words = [f"--{name}={value}" for name, value in given.items() if value is not None]
        status = commands.main(["evaluate", *words])
        return status, *capsys.readouterr(), tmp_path / "out"

    return run


def test_the_command_measures_a_trained_model(measured, trained, held_out):
    status, text, err, out = measured(
        model=trained, reference=TRL, before=TRL, data=held_out, beta=0.3, slice_by="topic"
    )
    assert status == 0, err
    assert {path.name for path in out.iterdir()} == FILES
    found = json.loads((out / "evaluation.json").read_text())
    assert (found["pairs"], found["loss"]["beta"]) == (24, 0.3)
    metrics, before, change = (found[name] for name in ("metrics", "metrics_before", "change"))
    assert before["loss"]["mean"] == pytest.approx(np.log(2), rel=1e-6)
    assert metrics["loss"]["mean"] < before["loss"]["mean"]
    assert change["loss"]["high"] < 0 < change["rewards/margins"]["low"]
    moved = found["displacement"]
    gap = moved["chosen"]["change"]["mean"] - moved["rejected"]["change"]["mean"]
    assert metrics["rewards/margins"]["mean"] == pytest.approx(0.3 * gap, rel=1e-4)
    slices = found["slices"]["topic"]
    assert {value: part["pairs"] for value, part in slices.items()} == {"even": 12, "odd": 12}
    rows = list(csv.DictReader((out / "slices.csv").read_text().splitlines()))
    assert {row["by"] for row in rows} == {"length", "turns", "topic"}
    for row in rows:
        mean = found["slices"][row["by"]][row["slice"]]["metrics"][row["metric"]]["mean"]
        assert float(row["mean"]) == pytest.approx(mean)
    assert (out / "margins.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "tokens.html").read_text()
    assert page.count("<article id=") == 6
    assert "before: reward +0.000" in page and "policy: reward +" in page
    assert "reference: log-probability" not in page  # there are two panels
    for word in ("rewards/accuracies", "topic", "share that fell", "change"):
        assert word in text


def test_losses_without_a_reference_need_none(measured, held_out):
    status, text, err, out = measured(model=TRL, data=held_out, loss="orpo", lam=0.5)
    assert status == 0, err
    found = json.loads((out / "evaluation.json").read_text())
    assert (found["reference"], found["displacement"], found["loss"]["lam"]) == (None, {}, 0.5)
    assert "reward " not in (out / "tokens.html").read_text()
    assert "share that fell" not in text
    assert measured(model=TRL, data=held_out, reference_free="true")[0] == 0


def test_labelled_completions_are_measured_by_their_label(measured, trained, held_out):
    status, _, err, out = measured(model=trained, reference=TRL, data=held_out, loss="kto", limit=24)
    assert status == 0, err
    found = json.loads((out / "evaluation.json").read_text())
    assert found["completions"] == 24
    desirable, undesirable = (found["displacement"][name] for name in ("desirable", "undesirable"))
    assert desirable["responses"] == undesirable["responses"] == 12
    assert desirable["change"]["mean"] > undesirable["change"]["mean"]
    assert {part: value["pairs"] for part, value in found["slices"]["label"].items()} == {
        "desirable": 12,
        "undesirable": 12,
    }


def test_a_reward_model_is_measured_without_tokens(measured, held_out, tmp_path):
    config = dataclasses.replace(load_config(TRL), reward=True)
    model = make_decoder(config)
    export(make_params(0, model), config, load_tokenizer(TRL), tmp_path / "reward", card={})
    status, _, err, out = measured(model=tmp_path / "reward", data=held_out, loss="bradley_terry")
    assert status == 0, err
    assert {path.name for path in out.iterdir()} == FILES - {"tokens.html"}
    assert "rewards/accuracies" in json.loads((out / "evaluation.json").read_text())["metrics"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(reference=None), "loss 'dpo' compares with a reference; write --reference=DIR"),
        (dict(loss="bradley_terry"), "leave out --reference"),
        (dict(loss="bradley_terry", reference=None), "is a language model"),
        (dict(data=None), "--data must be given"),
        (dict(modle="x"), "--modle: no such option; did you mean '--model'?"),
        (dict(beta="x"), "--beta='x' is of the wrong type; write a number"),
        (dict(lam=1), "'dpo' has no hyper-parameter 'lam'"),
        (dict(slice_by="nothing"), "no row has the field 'nothing'"),
        (dict(max_length=4096), "--max_length=4096 exceeds the 512 positions"),
        (dict(max_length=3), "no pairs left to measure, dropped 24 too long"),
        (dict(limit="x"), "limit"),
        (dict(examples=0), "--examples=0"),
    ],
)
def test_mistakes_are_one_line(measured, held_out, options, says):
    status, text, err, _ = measured(**dict(model=TRL, reference=TRL, data=held_out) | options)
    assert (status, text) == (2, "")
    assert err.count("\n") == 1 and err.startswith("error: ")
    assert says in err


def test_another_tokenizer_is_refused(measured, held_out, tmp_path):
    shutil.copytree(TRL, tmp_path / "other")
    path = tmp_path / "other/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(tokenizer))
    status, _, err, _ = measured(model=TRL, reference=tmp_path / "other", data=held_out)
    assert status == 2 and "the tokenizers must match" in err
