"""Weights of tokens by two models in a run: they are those of the formula, computed once and kept."""

import itertools
import json
import shutil

import numpy as np
import pytest

from prefalign_jax.data.chat import load_tokenizer
from prefalign_jax.data.pipeline import make_pair_set
from prefalign_jax.evaluation import contrast
from prefalign_jax.evaluation.contrast import weigh_tokens
from prefalign_jax.evaluation.held_out import response_logps
from prefalign_jax.experiment import read
from prefalign_jax.load_data import load_pairs
from prefalign_jax.policy import load
from prefalign_jax.sharding import make_mesh
from prefalign_jax.train import train
from prefalign_jax.types import UserError
from test_kept import other_base
from test_train import TRL, column, config_of

pytestmark = pytest.mark.usefixtures("light_runs")
FIELDS = {"steps": 2, "data.limit": 12, "export.enabled": False, "data.eval_fraction": 0.2}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{field: directory}: TRL's model before and after its DPO run, the latter the positive one."""
    positive = tmp_path_factory.mktemp("models") / "positive"
    shutil.copytree(TRL, positive)
    shutil.copy(TRL / "final_dpo.safetensors", positive / "model.safetensors")
    return {"token_weights.positive": str(positive), "token_weights.negative": str(TRL)}


def weighed(config, workdir):
    """(data without, data with the weights) of a run."""
    experiment = read(config).fitted(512)
    tokenizer = load_tokenizer(config.model.path)
    data = load_pairs(experiment, tokenizer)
    return data, weigh_tokens(experiment, data, tokenizer, make_mesh(config.mesh), workdir)


def test_weights_are_those_of_the_formula_and_computed_once(models, tmp_path, monkeypatch):
    config = config_of(**FIELDS, **models, **{"token_weights.mu": 2.0, "token_weights.high": 0.5})
    plain, data = weighed(config, tmp_path)
    for before, after in ((plain.training, data.training), (plain.held_out, data.held_out)):
        logps = [
            response_logps(*load(models[f"token_weights.{name}"])[:2], make_pair_set(before, 4))
            for name in ("positive", "negative")
        ]
        for pair, plus, minus in zip(after, *logps, strict=True):
            for number, sign in ((0, 2.0), (1, -2.0)):
                expected = np.exp(sign * np.clip(plus[number] - minus[number], -0.5, 0.5))
                np.testing.assert_allclose(pair.weights(number), expected, rtol=1e-4)
    weights = np.concatenate([pair.weights(0) for pair in data.training])
    assert weights.min() < 0.9 and weights.max() == pytest.approx(np.e)
    monkeypatch.setattr(contrast, "token_ratios", None)  # the ratios are kept: other options cost no pass of the models
    config.token_weights.mu = 0.0
    _, again = weighed(config, tmp_path)
    assert not again.training.weighted
    assert len(list((tmp_path / "token_weights").glob("*.npz"))) == 1


def test_responses_that_several_pairs_compare_are_computed_once_and_weigh_by_their_side(models, tmp_path):
    texts = " a red house", " the cat sat", " in the garden by the sea"
    rows = [{"prompt": "Tell me", "chosen": a, "rejected": b} for a, b in itertools.combinations(texts, 2)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {**models, "data.path": str(path), "batch_size": 3}
    (_, apart), (_, together) = (
        weighed(config_of(**fields, **{"data.group": group}), tmp_path / str(group)) for group in (False, True)
    )
    for one, other in zip(apart.training, together.training, strict=True):
        for number in range(2):
            np.testing.assert_allclose(one.weights(number), other.weights(number), rtol=1e-4)
    middle = together.training[2].weights(0) * together.training[0].weights(1)  # chosen here and rejected there
    np.testing.assert_allclose(middle, np.ones_like(middle), rtol=1e-5)


@pytest.mark.everything
def test_a_run_is_trained_with_them_and_goes_on_from_where_it_stopped(models, tmp_path, monkeypatch):
    train(config_of(**FIELDS, **models), tmp_path / "run")
    train(config_of(**FIELDS), tmp_path / "plain")
    one, other = (column(tmp_path / name) for name in ("run", "plain"))
    assert one[0] == pytest.approx(np.log(2), abs=1e-6)  # policy and reference are weighted alike
    assert abs(one[1] - other[1]) > 1e-3
    monkeypatch.setattr(contrast, "token_ratios", None)
    assert train(config_of(**{**FIELDS, "steps": 3}, **models), tmp_path / "run").step == 3
    with pytest.raises(UserError, match="it was trained with token_weights.mu=None, not 2.0"):
        train(config_of(**{**FIELDS, "steps": 4}, **models, **{"token_weights.mu": 2.0}), tmp_path / "run")


def test_a_model_that_does_not_fit_is_refused(models, tmp_path):
    fields = {**FIELDS, **models, "token_weights.negative": other_base(tmp_path / "b", permute=True)}
    with pytest.raises(UserError, match="token_weights.negative='.*b' has another tokenizer than model.path"):
        train(config_of(**fields), tmp_path / "run")
    short = other_base(tmp_path / "c", max_position_embeddings=100)
    with pytest.raises(UserError, match="token_weights.negative='.*c' has 100 positions, and max_length is 256"):
        train(config_of(**{**fields, "token_weights.negative": short}), tmp_path / "run")
