"""Losses of groups: what they are of two responses, and that neither order nor filler nor the other groups matter."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import longer
from prefalign_jax.losses import LOSSES, make_loss, ties_as_trl
from prefalign_jax.types import PairLogps, Responses, UserError

CASES = {
    "plackett_luce": {},
    "lipo": {},
    "lipo score": {"gain": "score"},
    "lipo unweighted": {"gain": "none", "discount": "none"},
    "info_nca": {},
    "nca_group": {},
    "sppo_group": {"beta": 0.1},
    "sppo_group ranks": {"beta": 0.1, "win_rate": "ranks", "own": False},
    "rrhf_group": {},
    "tpo": {"beta": 0.1},
    "tpo as TRL": {"beta": 0.1, "nll_mean": "batch"},
    "tpo_l": {},
    "reward_ranking": {"centre": 0.1},
    "reward_ranking comparisons": {"likelihood": "comparisons", "centre": 0.1},
}
BOUND = {case: make_loss(case.split()[0], **hyper) for case, hyper in CASES.items()}
SOONER = ("plackett_luce", "lipo", "sppo_group", "tpo", "reward_ranking")  # one of each kind of formula
all_groups = pytest.mark.parametrize("case", [case if case in SOONER else longer(case) for case in CASES])
B = 6  # of all groups here, so that few programs compile
SCORES = np.array(
    [
        [2.0, 1.0, 0.5, -1.0],
        [1.0, 1.0, 0.0, 0.0],
        [0.9, 0.2, 0.2, 0.2],
        [3.0, 3.0, 3.0, 3.0],
        [0.5, 2.0, -1.0, 1.0],
        [1.0, 0.0, 0.0, -1.0],
    ]
)


def groups(scores=SCORES, seed: int = 0, present=None, scale: float = 4.0) -> PairLogps:
    """Groups with these scores [B, K], the log-probabilities drawn at random."""
    rng = np.random.default_rng(seed)
    logps = -rng.gamma(2.0, scale, scores.shape).astype(np.float32)
    tokens = np.random.default_rng(1).integers(1, 9, scores.shape).astype(np.float32)
    present = np.ones_like(scores) if present is None else np.asarray(present)
    return record_of(Responses(logps, tokens, np.float32(scores), np.float32(present)))


def record_of(responses: Responses) -> PairLogps:
    """The record of these responses; chosen and rejected are the first two."""
    logps, tokens = responses.logps, responses.tokens
    mean_tokens = np.array([5.0, 4.0], np.float32)
    return PairLogps(logps[:, 0], logps[:, 1], tokens[:, 0], tokens[:, 1], mean_tokens=mean_tokens, responses=responses)


def evaluated(loss, policy, reference):
    """(loss, metrics, gradient to the responses' log-probabilities), each group by itself."""

    def f(logps):
        values, metrics = loss(record_of(policy.responses._replace(logps=logps)), reference if reads(loss) else None)
        return values.sum(), (values, metrics)

    grads, (values, metrics) = jax.grad(f, has_aux=True)(jnp.asarray(policy.responses.logps))
    return values, metrics, grads


def reads(loss) -> bool:
    return "reference" in loss.needs


def test_every_loss_of_groups_has_a_case():
    assert {case.split()[0] for case in CASES} == {name for name in LOSSES if "group" in make_loss(name).needs}


# (the loss of groups, its hyper-parameters, the same of pairs, what is left between them)
PAIR_FORMS = [
    ("plackett_luce", {"beta": 0.3}, "dpo", {"beta": 0.3}, 1.0),
    ("lipo", {"beta": 0.3, "gain": "none", "discount": "none"}, "dpo", {"beta": 0.3}, 1.0),
    ("lipo", {"beta": 0.3}, "dpo", {"beta": 0.3}, (2**1.5 - 2**0.5) * (1 - 1 / math.log2(3))),
    ("lipo", {"beta": 0.3, "gain": "score", "discount": "none"}, "dpo", {"beta": 0.3}, 1.0),
    ("info_nca", {"beta": 0.3, "alpha": 1e-3}, "dpo", {"beta": 0.3}, 1.0),
    ("nca_group", {"beta": 0.3, "alpha": 1e-3}, "nca", {"beta": 0.3}, 1.0),
    ("sppo_group", {"beta": 0.1, "win_rate": "ranks", "own": False}, "sppo", {"beta": 0.1}, 1.0),
    ("rrhf_group", {"lam": 0.3}, "rrhf", {"lam": 0.3}, 1.0),
    ("tpo", {"beta": 0.3, "alpha": 0.7}, "cpo", {"beta": 0.3, "alpha": 0.7}, 1.0),
    ("tpo_l", {"alpha": 0.0, "gamma": 0.4}, "simpo", {"beta": 2.0, "gamma": 0.4}, 1.0),
    ("reward_ranking", {"centre": 0.1}, "bradley_terry", {"centre": 0.1}, 1.0),
    ("reward_ranking", {"centre": 0.1, "likelihood": "comparisons"}, "bradley_terry", {"centre": 0.1}, 1.0),
]


@pytest.mark.parametrize(
    ("name", "hyper", "pair_name", "pair_hyper", "factor"),
    [longer(*form) if number % 2 else form for number, form in enumerate(PAIR_FORMS)],
)
def test_of_two_responses_it_is_the_loss_of_the_pair(name, hyper, pair_name, pair_hyper, factor):
    scores = np.tile([1.5, 0.5], (B, 1))
    policy, reference = groups(scores), groups(scores, seed=2, scale=1.0)
    loss, pair = make_loss(name, **hyper), make_loss(pair_name, **pair_hyper)
    values, metrics, grads = evaluated(loss, policy, reference)

    def of_pairs(chosen, rejected):
        record = policy._replace(chosen=chosen, rejected=rejected)
        values, metrics = pair(record, reference if reads(pair) else None)
        return values.sum(), (values, metrics)

    slopes, (wanted, wanted_metrics) = jax.grad(of_pairs, (0, 1), has_aux=True)(policy.chosen, policy.rejected)
    np.testing.assert_allclose(values, factor * wanted, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(grads, factor * np.stack(slopes, axis=1), rtol=1e-5, atol=1e-7)
    assert metrics.keys() == wanted_metrics.keys() | ({"nll_loss"} if name == "tpo_l" else set())
    for key, value in wanted_metrics.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


def test_the_gold_of_two_responses_is_the_chosen_one():
    scores = np.tile([1.5, 0.5], (B, 1))
    policy = groups(scores)
    with_nll, without = (make_loss("tpo_l", alpha=alpha)(policy)[0] for alpha in (0.7, 0.0))
    np.testing.assert_allclose(with_nll - without, -0.7 * policy.chosen / policy.chosen_tokens, rtol=1e-5)


@all_groups
def test_the_order_of_the_responses_changes_nothing(case):
    loss, order = BOUND[case], np.array([2, 0, 3, 1])
    policy, reference = groups(), groups(seed=2, scale=1.0)

    def turned(record):
        return record_of(jax.tree.map(lambda x: x[:, order], record.responses))

    values, metrics, grads = evaluated(loss, policy, reference)
    values_turned, metrics_turned, grads_turned = evaluated(loss, turned(policy), turned(reference))
    np.testing.assert_allclose(values_turned, values, rtol=1e-5)
    np.testing.assert_allclose(grads_turned, grads[:, order], rtol=1e-5, atol=1e-7)
    for key, value in metrics.items():
        np.testing.assert_allclose(metrics_turned[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


@all_groups
def test_filler_changes_nothing_wherever_it_is_and_whatever_it_holds(case):
    loss = BOUND[case]
    policy, reference = groups(), groups(seed=2, scale=1.0)

    def padded(record):
        filled = jax.tree.map(lambda x: np.insert(x, [1, 4, 4], np.float32(np.nan), axis=1), record.responses)
        return record_of(filled._replace(present=np.nan_to_num(filled.present)))

    values, metrics, grads = evaluated(loss, policy, reference)
    values_padded, metrics_padded, grads_padded = evaluated(loss, padded(policy), padded(reference))
    np.testing.assert_allclose(values_padded, values, rtol=1e-6)
    np.testing.assert_allclose(grads_padded[:, [0, 2, 3, 4]], grads, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(grads_padded[:, [1, 5, 6]], 0.0)
    for key, value in metrics.items():
        np.testing.assert_allclose(metrics_padded[key], value, rtol=1e-6, err_msg=key)


@all_groups
def test_groups_of_different_size_side_by_side_are_each_what_they_are_alone(case):
    present = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    scores = SCORES[[0, 2, 0, 0, 0, 1]] * present
    policy, reference = groups(scores, present=present), groups(scores, seed=2, present=present, scale=1.0)
    loss = BOUND[case]
    values, _, grads = evaluated(loss, policy, reference)
    assert np.isfinite(values).all() and np.isfinite(grads).all()
    for number, size in ((1, 3), (2, 2)):
        alone = [record_of(Responses(*(x[:, :size] for x in record.responses))) for record in (policy, reference)]
        value, _, grad = evaluated(loss, *alone)
        np.testing.assert_allclose(values[number], value[number], rtol=1e-5)
        np.testing.assert_allclose(grads[number, :size], grad[number], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", [case for case in CASES if "sppo" not in case and "nca" not in case])
def test_raising_the_best_never_raises_the_loss_and_raising_the_worst_never_lowers_it(case):
    if "reward" in case:
        loss = make_loss("reward_ranking", likelihood=BOUND[case].hyper["likelihood"])  # centring pulls as it likes
    else:
        loss = BOUND[case]
    scores = np.tile(SCORES[:1], (B, 1))
    _, _, grads = evaluated(loss, groups(scores), groups(scores, seed=2, scale=1.0))
    assert (grads[:, 0] <= 1e-7).all() and (grads[:, 0] < -1e-4).any()
    assert (grads[:, -1] >= -1e-7).all() and (grads[:, -1] > 1e-4).any()


def test_the_likelihoods_of_all_rankings_sum_to_one():
    scores = np.array(list(itertools.permutations(range(3))))  # as many as groups here
    logps = np.tile(np.float32([[-3.0, -1.0, -5.0]]), (B, 1))
    record = record_of(Responses(logps, np.ones_like(logps), np.float32(scores), np.ones_like(logps)))
    reference = record_of(record.responses._replace(logps=np.zeros_like(logps)))
    nll = make_loss("plackett_luce", beta=0.7)(record, reference)[0]
    np.testing.assert_allclose(np.exp(-nll).sum(), 1.0, rtol=1e-5)
    assert np.ptp(nll) > 1
    rewards = record_of(record.responses._replace(logps=0.7 * logps))
    np.testing.assert_allclose(make_loss("reward_ranking")(rewards)[0], nll, rtol=1e-5)


def test_responses_alike_are_held_against_the_worse_and_not_against_each_other():
    policy, reference = groups(), groups(seed=2, scale=1.0)
    r = 0.1 * (policy.responses.logps - reference.responses.logps)[1]  # scores 1, 1, 0, 0
    wanted = sum(np.log(1 + np.exp(r[2] - r[i]) + np.exp(r[3] - r[i])) for i in (0, 1))
    values, metrics, grads = evaluated(make_loss("plackett_luce"), policy, reference)
    np.testing.assert_allclose(values[1], wanted, rtol=1e-5)
    assert values[3] == 0 and not grads[3].any()  # all alike: nothing to learn
    assert np.isnan(metrics["rewards/accuracies"][3]) and np.isnan(metrics["rewards/margins"][3])
    np.testing.assert_allclose(metrics["rewards/chosen"][1], (r[0] + r[1]) / 2, rtol=1e-4)


def test_accuracy_is_the_share_of_comparisons_that_the_reward_orders():
    logps = np.float32([[-1.0, -2.0, -3.0, -4.0], [-4.0, -3.0, -2.0, -1.0], [-1.0, -3.0, -2.0, -2.0]] * 2)
    scores = np.float32(np.tile([3.0, 2.0, 1.0, 0.0], (B, 1)))
    record = record_of(Responses(logps, np.ones_like(logps), scores, np.ones_like(logps)))
    metrics = make_loss("reward_ranking")(record)[1]
    np.testing.assert_allclose(metrics["rewards/accuracies"], [1.0, 0.0, 3.5 / 6] * 2)
    np.testing.assert_allclose(metrics["rewards/margins"], [2.0, -2.0, -1 + 7 / 3] * 2, rtol=1e-6)
    with pytest.raises(UserError, match="accuracy_ties=trl: 'tpo' counts all comparisons"):
        ties_as_trl(make_loss("tpo"))


def dcg(r, scores) -> float:
    """Discounted cumulative gain of responses ranked by r."""
    rank = np.empty(len(r))
    rank[np.argsort(-np.asarray(r))] = np.arange(1, len(r) + 1)
    return np.sum((2.0 ** np.asarray(scores) - 1) / np.log2(1 + rank))


def test_lipos_weights_are_what_an_exchange_changes_in_the_ranking():
    policy, reference = groups(), groups(seed=2, scale=1.0)
    r = 0.05 * (policy.responses.logps - reference.responses.logps)[0]
    total, slope = 0.0, np.zeros(4)
    for i, j in itertools.combinations(range(4), 2):  # scores fall
        exchanged = r.copy()
        exchanged[[i, j]] = r[[j, i]]
        weight = abs(dcg(exchanged, SCORES[0]) - dcg(r, SCORES[0]))
        total += weight * np.log1p(np.exp(r[j] - r[i]))
        slope[[i, j]] += np.array([-1, 1]) * weight * 0.05 / (1 + np.exp(r[i] - r[j]))
    values, _, grads = evaluated(make_loss("lipo"), policy, reference)
    np.testing.assert_allclose(values[0], total, rtol=1e-5)
    np.testing.assert_allclose(grads[0], slope, rtol=1e-4, atol=1e-6)  # the weights are constants to it


def test_lipo_learns_from_the_first_step_on_where_all_rewards_are_equal():
    reference = record_of(groups().responses._replace(logps=np.full((B, 4), -8.0, np.float32)))
    _, _, grads = evaluated(make_loss("lipo"), reference, reference)
    learns = [0, 1, 2, 5]
    assert (grads[learns, 0] < 0).all() and (grads[learns, 3] > 0).all() and not grads[3].any()
    just_so = np.float32(1e-3 * SCORES - 8)  # ranked by the scores, those alike at one rank
    _, _, close = evaluated(make_loss("lipo"), record_of(reference.responses._replace(logps=just_so)), reference)
    np.testing.assert_allclose(grads, close, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("gain", ["exponential", "score"])
@pytest.mark.parametrize("largest", [1e4, 1e38])
def test_a_large_score_overflows_no_gain(gain, largest):
    policy = groups(np.float32(np.tile([largest, largest / 5, 0.0, -largest], (B, 1))))
    values, _, grads = evaluated(make_loss("lipo", gain=gain), policy, policy)
    assert np.isfinite(values).all() and np.isfinite(grads).all() and grads[0, 0] < 0


def test_sppos_win_rates_are_those_of_the_group():
    policy, reference = groups(), groups(seed=2, scale=1.0)
    a, s = (policy.responses.logps - reference.responses.logps)[0], SCORES[0]
    rates = np.mean(1 / (1 + np.exp(s[None, :] - s[:, None])), axis=1)
    value = make_loss("sppo_group", beta=0.1)(policy, reference)[0][0]
    np.testing.assert_allclose(value, np.sum((a - 10 * (rates - 0.5)) ** 2), rtol=1e-5)


def test_a_group_of_three_or_more_has_gold_chosen_and_rejected():
    policy = groups(SCORES[:, [2, 0, 3, 1]])  # the second is gold, the last chosen, the third rejected
    logps, tokens = policy.responses.logps[0], policy.responses.tokens[0]
    wanted = np.log1p(np.exp(-0.1 * (logps[3] - logps[2]))) - logps[1] / tokens[1]
    np.testing.assert_allclose(make_loss("tpo", beta=0.1)(policy)[0][0], wanted, rtol=1e-5)
    as_trl = np.log1p(np.exp(-0.1 * (logps[3] - logps[2]))) - logps[1] / 4.0  # the batch's mean tokens
    np.testing.assert_allclose(make_loss("tpo", beta=0.1, nll_mean="batch")(policy)[0][0], as_trl, rtol=1e-5)


def test_a_mixture_of_groups_may_imitate_the_best():
    policy, reference = groups(), groups(seed=2)
    mixture = make_loss("plackett_luce + 0.5*sft(mean=pair)", beta=0.2)
    assert {"group", "reference"} <= mixture.needs and mixture.unit == "groups"
    wanted = make_loss("plackett_luce", beta=0.2)(policy, reference)[0] - 0.5 * policy.chosen / policy.chosen_tokens
    np.testing.assert_allclose(mixture(policy, reference)[0], wanted, rtol=1e-5)
