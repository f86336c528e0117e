"""The package as a library: what `import prefalign_jax` offers, and what it says of mistakes."""

import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prefalign_jax.losses.dpo as dpo_module
from prefalign_jax import losses
from prefalign_jax.losses import LOSSES, Loss, dpo, make_loss
from prefalign_jax.types import PairLogps, UserError
from test_losses import draw

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
