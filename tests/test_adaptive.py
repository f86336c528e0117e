import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefalign_jax.losses import make_loss
from prefalign_jax.losses.adaptive import advance_alpha_dpo, alpha_dpo, beta_dpo
from prefalign_jax.losses.simpo import simpo
from test_dpo import logps
from test_losses import draw


def test_beta_dpo_keeps_the_likeliest_pairs_and_adapts_beta_to_them_without_gradient():
    reference = logps([-5.0] * 5, [-5.0] * 5)
    policy = logps([-4, -4, -5, -3, -1], [-5, -6, -5, -5, -9])  # h = 1, 2, 0, 2, 8
    policy = policy._replace(weight=np.ones(5, np.float32), running={"mean_margin": jnp.float32(1.0)})
    loss, metrics = beta_dpo(policy, reference, beta=0.1, alpha=0.6)
    np.testing.assert_array_equal(metrics["kept"], [1, 1, 1, 1, 0])  # 8 is far off
    adapted = 0.1 * (1 + 0.6 * (5 / 4 - 1))
    np.testing.assert_allclose(metrics["beta"], adapted, rtol=1e-6)
    h = np.array([1, 2, 0, 2, 8])
    np.testing.assert_allclose(loss.mean(), np.log1p(np.exp(-adapted * h[:4])).mean(), rtol=1e-6)
    slope = jax.grad(lambda w: beta_dpo(policy._replace(chosen=w), reference, beta=0.1, alpha=0.6)[0].mean())
    wanted = np.where(h < 8, -adapted / (1 + np.exp(adapted * h)) / 4, 0)  # beta itself is a constant
    np.testing.assert_allclose(slope(policy.chosen), wanted, rtol=1e-5)


def test_beta_never_falls_below_its_floor():
    policy = logps([-9.0], [-1.0])._replace(weight=np.ones(1, np.float32), running={"mean_margin": jnp.float32(5.0)})
    assert beta_dpo(policy, logps([-1.0], [-1.0]))[1]["beta"] == np.float32(1e-3)


NOTHING = {"gap_mean": jnp.float32(0), "gap_std": jnp.float32(0), "gap_seen": jnp.float32(0)}


def gap_of(policy, reference) -> np.ndarray:
    ratios = (policy[side] - reference[side] for side in (0, 1))
    chosen, rejected = (r / np.maximum(n, 1) for r, n in zip(ratios, policy[2:4], strict=True))
    return chosen - rejected


def test_alpha_dpo_is_simpo_before_the_first_step_and_without_alpha():
    policy, reference = draw(6, dtype=np.float32)
    wanted = simpo(policy, beta=2.0, gamma=0.7)[0]
    started = policy._replace(running=NOTHING)
    np.testing.assert_allclose(alpha_dpo(started, reference, beta=2.0, gamma=0.7, alpha=0.5)[0], wanted, rtol=1e-6)
    later = policy._replace(running={"gap_mean": 1.0, "gap_std": 0.5, "gap_seen": 0.5})
    np.testing.assert_allclose(alpha_dpo(later, reference, beta=2.0, gamma=0.7, alpha=0.0)[0], wanted, rtol=1e-6)


def test_the_target_is_greater_where_the_policy_tells_the_pair_apart_already():
    policy, reference = draw(6, dtype=np.float32)
    policy = policy._replace(running=NOTHING)
    policy = policy._replace(running=advance_alpha_dpo(policy, reference, momentum=0.9))
    target = alpha_dpo(policy, reference, beta=2.0, gamma=0.7, alpha=0.5)[1]["target_margin"]
    gap = gap_of(policy, reference)
    # One batch seen is that batch's own statistics, whatever the momentum.
    np.testing.assert_allclose(target, 0.7 + 2 * 0.5 * (gap - gap.mean()) / gap.std(), rtol=1e-4)
    assert (np.argsort(target) == np.argsort(gap)).all()


def test_no_gradient_passes_through_the_target_of_alpha_dpo():
    policy, reference = draw(6, dtype=np.float32)
    policy = policy._replace(running={"gap_mean": 0.3, "gap_std": 0.5, "gap_seen": 0.5})
    loss = lambda w: alpha_dpo(policy._replace(chosen=w), reference, beta=2.0, alpha=0.5)  # noqa: E731
    margin = (policy.chosen / policy.chosen_tokens - policy.rejected / policy.rejected_tokens) * 2.0
    wrong = 1 / (1 + np.exp(margin - loss(policy.chosen)[1]["target_margin"]))
    slope = jax.grad(lambda w: loss(w)[0].sum())(policy.chosen)
    np.testing.assert_allclose(slope, -2.0 * wrong / policy.chosen_tokens, rtol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_statistics_are_weighted_means_of_the_batches_seen(momentum):
    loss, running, seen = make_loss("alpha_dpo", momentum=momentum), None, []
    for seed in range(3):
        policy, reference = draw(5, seed, np.float32, filler=2)
        running = loss.advance(policy._replace(running=running or loss.running), reference)
        gap = gap_of(policy, reference)[:5]
        seen.append((gap.mean(), gap.std()))
    shares = momentum ** np.arange(3.0)[::-1]
    mean, std = np.average(seen, axis=0, weights=shares)
    np.testing.assert_allclose(running["gap_mean"] / running["gap_seen"], mean, rtol=1e-4)
    np.testing.assert_allclose(running["gap_std"] / running["gap_seen"], std, rtol=1e-4)


def test_a_policy_that_is_its_reference_has_no_deviation_and_simpos_target():
    policy, _ = draw(4, dtype=np.float32)
    policy = policy._replace(running=NOTHING)
    policy = policy._replace(running=advance_alpha_dpo(policy, policy, momentum=0.9))
    np.testing.assert_array_equal(alpha_dpo(policy, policy, gamma=0.5)[1]["target_margin"], 0.5)
