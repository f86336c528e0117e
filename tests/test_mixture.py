"""Several sources as one: what is taken of each, in which shares, and that no prompt is on both sides."""

import collections
import json
import math

import numpy as np
import pytest
from ml_collections import ConfigDict

from prefalign_jax import load_data
from prefalign_jax.cli import experiments
from prefalign_jax.config import defaults
from prefalign_jax.data.mixture import Source, in_proportion, normalised, prompt_key, read_source, source_digest
from prefalign_jax.data.reading import Tally
from prefalign_jax.experiment import read as read_experiment
from prefalign_jax.types import UserError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def pair(prompt, source="a"):
    return {"prompt": prompt, "chosen": f" yes, {prompt}", "rejected": f" no, {prompt}", "source": source}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(source, number=0, **kind):
    tally = Tally()
    return list(read_source(source, number, tally, **kind)), {k: v for k, v in tally.dropped.items() if v}


def config_of(tmp_path, mix=None, loss="dpo", **data):
    c = defaults(loss)
    c.model.path, c.max_length, c.data.cache_dir = "MODEL", 256, str(tmp_path / "cache")
    c.data.mix = mix
    c.data.update(data)
    read_experiment(c)
    return c


def test_a_command_line_can_name_sources(tmp_path):
    (tmp_path / "e.py").write_text("from prefalign_jax import config\nget_config = lambda: config.defaults('dpo')\n")
    mix = '({"path": "a", "weight": 0.7}, {"path": "b", "weight": 0.3})'
    config = experiments.config_of(f"{tmp_path}/e.py", [f"--config.data.mix={mix}", "--config.model.path=m"])
    read_experiment(config)
    assert [source["weight"] for source in config.data.mix] == [0.7, 0.3]


@pytest.fixture
def load(tmp_path, tiny_tokenizer):
    """load(mix, **data fields) -> (training prompts, held-out prompts, the `Data`)."""

    def run(mix=None, seed=0, loss="dpo", **data):
        c = config_of(tmp_path, mix, loss, **data)
        c.seed = seed
        found = load_data.load_pairs(read_experiment(c), tiny_tokenizer)
        sides = [[tiny_tokenizer.decode(one.prompt) for one in part] for part in (found.training, found.held_out)]
        return *sides, found

    return run


# What is taken of a source.


def test_filter_columns_and_map_fn(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def longer(row):\n"
        "    if row['prompt'] == 'bad':\n        return None\n"
        "    if row['prompt'] == 'two':\n        return [row, {**row, 'prompt': 'three'}]\n"
        "    return {**row, 'prompt': row['prompt'] + '?'}\n"
        "def fails(row):\n    return row['nothing']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = [
        {"info": {"q": q}, "good": "x", "bad": "y", "kind": kind}
        for q, kind in (("one", "a"), ("two", "b"), ("bad", "a"), ("four", "c"), ("five", None))
    ]
    columns = {"prompt": "info.q", "chosen": "good", "rejected": "bad"}
    path = write(tmp_path / "rows.jsonl", rows)
    source = Source(path, columns=columns, filter={"kind": ("a", "b")}, map_fn="mine:longer")
    records, dropped = read(source, number=3)
    assert [r.prompt for r in records] == ["one?", "two", "three"] and {r.source for r in records} == {3}
    assert dropped == {"left out by the filter": 2, "left out by map_fn": 1}
    assert [r.prompt for r in read(Source(path, columns=columns, filter={"kind": "c"}))[0]] == ["four"]
    # Exchanged names are exchanged at once.
    swapped = Source(path, columns={**columns, "chosen": "bad", "rejected": "good"})
    assert {(r.chosen, r.rejected) for r in read(swapped)[0]} == {("y", "x")}
    for source, message in (
        (Source(path, columns={"prompt": "info.p"}), "row 1: columns: no field 'info.p', found info, good, bad, kind"),
        (Source(path, filter={"knid": "a"}), "row 1: filter: no field 'knid', found info"),
        (Source(path, map_fn="mine:fails"), "row 1: map_fn mine:fails: KeyError: 'nothing'"),
    ):
        with pytest.raises(UserError) as caught:
            read(source)
        assert str(caught.value).startswith(f"{path}, {message}")
    # A change in its module is a change of the data.
    before = source_digest(Source(path, map_fn="mine:longer"))
    (tmp_path / "mine.py").write_text((tmp_path / "mine.py").read_text() + "\n")
    assert source_digest(Source(path, map_fn="mine:longer")) != before


def test_columns_name_the_common_format_even_where_another_is_there(tmp_path):
    row = {"instruction": "q", "output": "theirs", "text": "x", "a": "yes", "b": "no"}
    path = write(tmp_path / "rows.jsonl", [row])
    source = Source(path, columns={"prompt": "instruction", "chosen": "a", "rejected": "b"}, ignore=("output", "text"))
    (record,), _ = read(source)
    assert record[:3] == ("q", "yes", "no")
    # What another column takes the place of is counted.
    replaced = write(tmp_path / "replaced.jsonl", [{"q": "Hi?", "prompt": "Hello?", "chosen": "yes", "rejected": "no"}])
    tally = Tally()
    assert next(read_source(Source(replaced, columns={"prompt": "q"}), 0, tally)).prompt == "Hi?"
    assert tally.unread == {"prompt": 1}


def test_a_fraction_is_drawn_by_the_seed_and_nested_and_the_rest_is_counted(tmp_path):
    path = write(tmp_path / "rows.jsonl", [pair(f"p{i}") for i in range(1000)])
    few, dropped = read(Source(path, fraction=0.2))
    assert 150 < len(few) < 250 and dropped == {"left out by the fraction": 1000 - len(few)}
    assert {r.prompt for r in few} < {r.prompt for r in read(Source(path, fraction=0.5))[0]}
    assert [r.prompt for r in read(Source(path, fraction=0.2))[0]] == [r.prompt for r in few]
    assert {r.prompt for r in read(Source(path, fraction=0.2), seed=1)[0]} != {r.prompt for r in few}
    assert [r.prompt for r in read(Source(path, fraction=0.2, limit=5))[0]] == [r.prompt for r in few[:5]]


def test_the_digest_is_of_all_that_decides_what_is_read(tmp_path):
    path = write(tmp_path / "rows.jsonl", [pair("p")])
    base = Source(path)
    changes = dict(limit=3, fraction=0.5, format="common", filter={"source": "a"}, columns={"prompt": "p"}, use="eval")
    digests = {source_digest(base), *(source_digest(base._replace(**{k: v})) for k, v in changes.items())}
    assert len(digests) == 1 + len(changes) and source_digest(base) in digests
    assert source_digest(base._replace(weight=2.0)) == source_digest(base)  # it is applied later
    write(tmp_path / "rows.jsonl", [pair("q")])
    assert source_digest(base) not in digests


# Shares.


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.5, 0.3, 0.2), (7, 2, 1), (0.001, 1, 1)])
def test_shares_are_as_the_weights_and_as_many_as_can_be(weights):
    counts = (100, 60, 30)
    numbers = np.random.default_rng(0).permutation(np.repeat(np.arange(3), counts))
    chosen = in_proportion(numbers, weights, seed=0)
    assert len(set(chosen.tolist())) == len(chosen) and (np.diff(chosen) > 0).all()
    taken = np.bincount(numbers[chosen], minlength=3)
    share = np.array(weights) / sum(weights)
    assert np.abs(taken - len(chosen) * share).max() <= 1  # to a pair
    assert (taken == counts).any(), "more could be taken"
    assert in_proportion(numbers, weights, seed=0).tolist() == chosen.tolist()
    if min(taken) < min(counts):
        assert in_proportion(numbers, weights, seed=1).tolist() != chosen.tolist()


def test_without_weights_everything_is_taken():
    assert in_proportion(np.array([1, 0, 1]), [None, None], seed=0).tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="no pair is left of source 1 of data.mix"):
        in_proportion(np.array([0, 0]), [1, 1], seed=0)


def test_a_mixture_counts_what_each_source_gave(load, tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", [pair(f"apple {i}") for i in range(60)] + [{**pair("x"), "rejected": " "}])
    b = write(tmp_path / "b.jsonl", [pair(f"berry {i}", "bc"[i % 2]) for i in range(40)])
    mix = ({"path": a, "weight": 0.75}, {"path": b, "weight": 0.25, "filter": {"source": "b"}})
    training, held_out, data = load(mix)
    found = collections.Counter(prompt.split()[0] for prompt in training)
    assert found == {"apple": 60, "berry": 20} and held_out == []
    assert data.dropped["training"] == {"empty response": 1, "left out by the filter": 20}
    assert [(one["source"], one["pairs"], one["share"]) for one in data.sources] == [(a, 60, 0.75), (b, 20, 0.25)]
    said = capsys.readouterr().err
    assert f"  {a}: 60 (75.0%); dropped 1 empty response\n" in said
    assert f"  {b}: 20 (25.0%); dropped 20 left out by the filter\n" in said
    # Other weights need no other reading, and other seeds take others.
    few = [load(({**mix[0], "weight": 1}, {**mix[1], "weight": 1}), seed=seed) for seed in (0, 0, 1)]
    assert [len(one[0]) for one in few] == [40] * 3 and few[0][0] == few[1][0] != few[2][0]
    assert few[0][2].dropped["training"]["beyond its source's weight"] == 40
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 1


def test_formats_may_differ_and_kinds_of_losses_are_read(load, tmp_path):
    shp = {"history": "H?", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_ratio": 2.0}
    mix = ({"path": write(tmp_path / "shp.jsonl", [shp])}, {"path": write(tmp_path / "a.jsonl", [pair("p")])})
    training, _, data = load(mix)
    assert training == ["<|im_start|>user\nH?<|im_end|>\n<|im_start|>assistant\n", "p"]
    assert [one["share"] for one in data.sources] == [0.5, 0.5]
    assert len(load(mix, loss="kto")[0]) == 4
    assert len(load(mix, loss="sft")[0]) == 2


# Splits.


def test_prompts_that_differ_in_writing_alone_are_the_same():
    same = [
        "Why is the sky blue?",
        " why  is the\nsky BLUE?",
        [user("Why is the sky blue?")],
        "\n\nHuman: Why is the sky blue?\n\nAssistant:",
        "Why is the sky \uff42lue?",
    ]
    assert len({prompt_key(prompt) for prompt in same}) == 1
    other = ["Why is the sky blue", "Why is the sea blue?", [user("Why"), user("is the sky not blue?")], ""]
    assert len({prompt_key(prompt) for prompt in [*same, *other]}) == 5
    assert normalised([user("A"), assistant("B")]) == normalised("\n\nHuman: a\n\nAssistant: b") == "a b"


def test_no_prompt_is_on_both_sides_of_a_split_in_any_source(load, tmp_path):
    """The same prompts in three sources, in several ways of writing them."""
    prompts = [f"Question {i} of the day?" for i in range(200)]
    a = write(tmp_path / "a.jsonl", [pair(p) for p in prompts])
    b = write(tmp_path / "b.jsonl", [pair(p.upper()) for p in prompts[::2]] + [pair(p) for p in prompts])
    c = write(tmp_path / "c.jsonl", [{"chosen": f"\n\nHuman: {p}\n\nAssistant: x", "rejected": f"\n\nHuman: {p}\n\n"
                                      "Assistant: y"} for p in prompts[:50]])  # fmt: skip
    training, held_out, data = load(tuple({"path": path} for path in (a, b, c)), eval_fraction=0.25)
    sides = [{prompt_key(prompt) for prompt in part} for part in (training, held_out)]
    assert not sides[0] & sides[1] and 30 < len(held_out) < 200
    assert len(training) + len(held_out) + data.dropped["training"]["prompt held out"] == 550
    assert data.dropped["training"]["prompt held out"] > 10, "nothing leaked here"
    assert load(tuple({"path": path} for path in (a, b, c)), eval_fraction=0.25)[:2] == (training, held_out)


def test_evaluation_and_test_sets_keep_their_prompts_out_of_training(load, tmp_path):
    train_ = write(tmp_path / "train.jsonl", [pair(f"p{i}") for i in range(10)])
    eval_ = write(tmp_path / "eval.jsonl", [pair(f"P{i} ") for i in (1, 2, 11)])
    test = write(tmp_path / "test.jsonl", [{"prompt": f" p{i}"} for i in (2, 3)])
    mix = ({"path": train_}, {"path": eval_, "use": "eval"}, {"path": test, "use": "test"})
    training, held_out, data = load(mix)
    assert training == [f"p{i}" for i in (0, 4, 5, 6, 7, 8, 9)] and held_out == ["P1 ", "P11 "]
    assert data.dropped == {"training": {"prompt held out": 3}, "held out": {"prompt of a test set": 1}}
    assert len(load(mix, leaks="report")[0]) == 10


def test_with_one_file_a_leak_is_reported_and_left_out_where_that_is_asked_for(load, tmp_path, capsys):
    train_ = write(tmp_path / "train.jsonl", [pair(f"p{i}") for i in range(10)])
    eval_ = write(tmp_path / "eval.jsonl", [pair(f"P{i}") for i in (1, 2, 11)])
    assert len(load(path=train_, eval_path=eval_)[0]) == 10
    said = "2 training pairs have a prompt that is held out too; data.leaks=drop leaves them out\n"
    assert said in capsys.readouterr().err
    training, held_out, data = load(path=train_, eval_path=eval_, leaks="drop")
    assert len(training) == 8 and held_out == ["P1", "P2", "P11"]
    assert data.dropped["training"] == {"prompt held out": 2} and data.sources == []


def test_one_file_is_read_as_by_read_records_and_held_out_as_by_split_by_prompt(load, tmp_path):
    from prefalign_jax.data.records import read_records, split_by_prompt

    path = write(tmp_path / "a.jsonl", [pair(f"p{i}") for i in range(100)])
    for seed in (0, 1):
        sides = split_by_prompt(read_records(path, limit=80)[0], 0.2, seed)
        training, held_out, _ = load(path=path, limit=80, eval_fraction=0.2, seed=seed)
        assert [training, held_out] == [[record.prompt for record in side] for side in sides]
    training, few, data = load(path=path, limit=80, eval_fraction=0.2, eval_limit=3)
    assert few == load(path=path, limit=80, eval_fraction=0.2)[1][:3] and len(few) == 3
    assert load(path=path, flip_labels=0.3)[0] == [f"p{i}" for i in range(100)]


def test_a_prompt_that_only_looks_different_is_not_kept_for_training_beside_its_twin(load, tmp_path):
    path = write(tmp_path / "a.jsonl", [pair(f"{'Pp'[j]}{i}") for i in range(100) for j in (0, 1)])
    training, held_out, data = load(path=path, eval_fraction=0.2)
    assert not {p.lower() for p in training} & {p.lower() for p in held_out}
    assert len(training) + len(held_out) + data.dropped["training"]["prompt held out"] == 200


def test_from_the_cache_no_row_is_read_and_a_changed_file_is_read_again(load, tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "a.jsonl", [pair(f"p{i}") for i in range(30)] + [{**pair("x"), "rejected": " "}])
    made = load(path=path, eval_fraction=0.2)
    said = capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(load_data, "source_records", lambda *_, **__: pytest.fail("read again"))
        cached = load(path=path, eval_fraction=0.2)
        assert cached[:2] == made[:2] and capsys.readouterr().err == said and "1 empty response" in said
    write(tmp_path / "a.jsonl", [pair(f"q{i}") for i in range(30)])
    assert load(path=path, eval_fraction=0.2)[0][0].startswith("q")


# Mistakes.


@pytest.mark.parametrize(
    ("mix", "fields", "message"),
    [
        (("a.jsonl",), {}, r"data.mix\[0\]: expected a dict with 'path' and any of use, split, .*, found 'a.jsonl'"),
        (({"path": "a", "wieght": 1},), {}, r"data.mix\[0\]: no field 'wieght', did you mean 'weight'"),
        (({"path": "a", "use": "tset"},), {}, r"data.mix\[0\].use='tset'.* mean 'test'"),
        (({"path": "a", "format": "hsp"},), {}, r"data.mix\[0\].format='hsp'.* mean 'shp'"),
        (({"path": "a", "fraction": 2},), {}, r"fraction=2 must lie in \(0, 1\]"),
        (({"path": "a", "limit": 0},), {}, r"data.mix\[0\].limit=0 must be positive"),
        (({"path": "a", "weight": math.nan},), {}, r"data.mix\[0\].weight=nan must be positive"),
        (({"path": "a", "weight": "1"},), {}, r"data.mix\[0\].weight='1' is no number"),
        (({"path": "a", "columns": 3},), {}, r"data.mix\[0\].columns=3 is no mapping"),
        (({"path": "a", "columns": "x"},), {}, r"data.mix\[0\].columns='x': write NAME=THEIRS"),
        (({"path": "a", "ignore": 3},), {}, r"data.mix\[0\].ignore=3: write names of fields"),
        (({"path": "a", "weight": 1}, {"path": "b"}), {}, "give every training source a weight or none; b has none"),
        (({"path": "a", "use": "eval"},), {}, "data.mix has no source with use='train'"),
        (
            ({"path": "a"}, {"path": "b", "use": "eval", "weight": 1}),
            {},
            r"data.mix\[1\].weight applies to use='train'",
        ),
        (({"path": "a"}, {"path": "b", "use": "test", "limit": 1}), {}, r"data.mix\[1\].limit applies to"),
        (({"path": "a", "split": "test_prefs"},), {}, r"data.mix\[0\]: the split 'test_prefs' is for measuring"),
        (({"path": "a", "map_fn": "json"},), {}, r"data.mix\[0\].map_fn='json': expected 'module:function'"),
        (({"path": "a", "map_fn": "no_such:f"},), {}, "No module named 'no_such'"),
        (({"path": "a"},), {"path": "b"}, "data.path='b' and data.mix are both set"),
        (({"path": "a"},), {"eval_path": "b"}, "data.eval_path='b' and data.mix are both set"),
        (({"path": "a"},), {"limit": 3}, "data.limit=3 and data.mix are both set"),
        (({"path": "a"}, {"path": "b", "use": "eval"}), {"eval_limit": 3}, "data.eval_limit=3 and data.mix are both"),
        (
            ({"path": "a"}, {"path": "b", "use": "eval"}),
            {"eval_split": "x"},
            "data.eval_split='x' and data.mix",
        ),
        (
            ({"path": "a"}, {"path": "b", "use": "eval"}),
            {"eval_fraction": 0.1},
            "both name the held-out data",
        ),
        (None, {"path": "a", "format": "hsp"}, "data.format='hsp'.* mean 'shp'"),
        (None, {"path": "a", "leaks": "drop"}, "data.leaks='drop' is set without held-out data"),
        (None, {"path": "a", "eval_fraction": 0.1, "leaks": "keep"}, "data.leaks='keep'"),
    ],
)
def test_a_mistake_is_named(tmp_path, mix, fields, message):
    with pytest.raises(UserError, match=message) as caught:
        config_of(tmp_path, mix, **fields)
    assert "\n" not in str(caught.value)


def test_a_mixture_survives_json(tmp_path):
    """A run that goes on compares its config with the one on disk."""
    for source in ({"path": "a", "filter": {"x": ("y",)}}, ConfigDict({"path": "a", "filter": {"x": ("y",)}})):
        plain = read_experiment(config_of(tmp_path, (source,))).plain
        assert json.loads(json.dumps(plain)) == plain
        assert plain["data"]["mix"] == [{"path": "a", "filter": {"x": ["y"]}}]


# One source takes what those of a mixture take.


def test_one_source_takes_columns_a_function_and_fields_to_ignore(load, tmp_path, monkeypatch, capsys):
    (tmp_path / "loud.py").write_text("def loud(row):\n    return {**row, 'prompt': row['prompt'].upper()}\n")
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{"info": {"q": f"p{i}"}, "good": " a", "bad": " b", "label": True, "id": i} for i in range(6)]
    paths = [write(tmp_path / f"{name}.jsonl", some) for name, some in (("a", rows[:4]), ("b", rows[4:]))]
    fields = {"map_fn": "loud:loud", "ignore": "label"}
    for columns in (
        "prompt=info.q, chosen=good,rejected=bad",
        {"prompt": "info.q", "chosen": "good", "rejected": "bad"},
    ):
        training, held_out, data = load(path=paths[0], eval_path=paths[1], columns=columns, **fields)
        assert (training, held_out) == (["P0", "P1", "P2", "P3"], ["P4", "P5"])
    assert data.unread["training"] == {"label": 4, "info": 4, "id": 4}
    said = capsys.readouterr().err
    assert "training data: 4 pairs; dropped none; not used: label, info, id (4 rows each)\n" in said
    assert "held out data: 2 pairs; dropped none; not used: label, info, id (2 rows each)\n" in said
    # The source of a mixture says it for itself.
    mix = ({"path": paths[0], "columns": columns, "ignore": ["label"]},)
    assert load(mix)[0] == ["p0", "p1", "p2", "p3"]
    with pytest.raises(
        UserError, match=r"row 1: field 'label' holds whether .* write data.ignore=label to leave it out"
    ):
        load(path=paths[0], columns=columns)
    with pytest.raises(UserError, match=r"a.jsonl: data.ignore: no row has the field 'lable'"):
        load(path=paths[0], columns=columns, ignore="label,lable")
    with pytest.raises(UserError, match=r"data.columns='prompt': write NAME=THEIRS"):
        load(path=paths[0], columns="prompt")
    with pytest.raises(UserError, match=r"data.ignore='label' and data.mix are both set"):
        load(mix, ignore="label")


def test_a_command_line_can_name_columns(tmp_path):
    (tmp_path / "e.py").write_text("from prefalign_jax import config\nget_config = lambda: config.defaults('dpo')\n")
    for columns in ("prompt=q,chosen=good", "{'prompt': 'q', 'chosen': 'good'}"):
        words = [f"--config.data.columns={columns}", "--config.data.path=a", "--config.model.path=m"]
        experiment = read_experiment(experiments.config_of(f"{tmp_path}/e.py", words))
        (source,) = experiment.sources
        assert source.columns == {"prompt": "q", "chosen": "good"}
        assert json.loads(json.dumps(experiment.plain))["data"]["columns"] in (
            columns,
            {"prompt": "q", "chosen": "good"},
        )


def test_seeds_of_training_share_what_is_held_out_if_it_has_a_seed_of_its_own(load, tmp_path):
    path = write(tmp_path / "a.jsonl", [pair(f"p{i}") for i in range(60)])
    drawn = {(own, seed): load(path=path, eval_fraction=0.3, eval_seed=own, seed=seed)[1]
             for own, seed in ((None, 0), (None, 1), (0, 1), (1, 0), (5, 5))}  # fmt: skip
    assert drawn[None, 0] == drawn[0, 1] != drawn[None, 1] == drawn[1, 0]
    assert drawn[5, 5] not in (drawn[None, 0], drawn[None, 1])


def test_a_directory_trains_on_what_is_training_data_by_its_name_and_says_what_is_not(load, tmp_path, capsys):
    for name in ("train", "test"):
        write(tmp_path / "d" / f"mine_{name}.jsonl", [pair(f"{name} {i}") for i in range(3)])
    directory = str(tmp_path / "d")
    training, _, _ = load(path=directory)
    assert training == ["train 0", "train 1", "train 2"]
    assert f"{directory}: not read for training: mine_test.jsonl (test)\n" in capsys.readouterr().err
    assert load(path=directory, eval_path=directory)[1] == ["test 0", "test 1", "test 2"]


def test_a_run_says_what_it_reads_in_part(load, tmp_path, capsys):
    talk = [user("One?"), assistant("1"), user("Two?"), assistant("2")]
    rows = [{"messages": talk}, {"messages": talk[2:]}, {"prompt": "p", "completion": " c"}]
    file = write(tmp_path / "a.jsonl", rows)
    for train_on, note in (
        ("all", "with several answers that are trained"),
        ("last", "with earlier answers, which are not trained"),
    ):
        _, _, data = load(path=file, loss="sft", train_on=train_on)
        assert data.notes["training"] == {note: 1, "as plain text, the others as messages": 1}
        said = f"; 1 {note}, 1 as plain text, the others as messages\n"
        assert said in capsys.readouterr().err


def test_the_opening_of_a_test_sets_conversation_is_kept_out_where_every_answer_is_trained(load, tmp_path):
    def talk(*texts):
        return [(user, assistant)[i % 2](text) for i, text in enumerate(texts)]

    conversations = [talk("A?", "a", "B?", "b"), talk("C?", "c", "D?", "d"), talk("E?", "e")]
    file = write(tmp_path / "train.jsonl", [{"messages": messages} for messages in conversations])
    test = write(
        tmp_path / "test.jsonl", [{"prompt": talk("a?", "other", "B?")}, {"messages": talk("C?", "c", "D?", "x")}]
    )
    mix = ({"path": file}, {"path": test, "use": "test"})
    assert load(mix, loss="sft", train_on="all")[2].dropped["training"]["prompt held out"] == 2
    assert load(mix, loss="sft", train_on="last")[2].dropped["training"]["prompt held out"] == 1


def test_what_is_trained_of_a_conversation_is_in_the_key_of_its_tokens(load, tmp_path):
    file = write(tmp_path / "a.jsonl", [{"messages": [user("A?"), assistant("a"), user("B?"), assistant("b")]}])
    prompts = [
        load(path=file, loss="sft", train_on=which, cache_dir=str(tmp_path))[2].notes["training"]
        for which in ("all", "last", "all")
    ]
    assert prompts[0] == prompts[2] != prompts[1]
