import numpy as np

from prefalign_jax.losses.sft import sft
from prefalign_jax.types import PairLogps

POLICY = PairLogps(
    chosen=np.float32([-6, -2]),
    rejected=np.float32([0, 0]),
    chosen_tokens=np.float32([3, 1]),
    rejected_tokens=np.float32([0, 0]),
    prompt=np.float32([-4, -8]),
    prompt_tokens=np.float32([2, 2]),
    mean_tokens=np.float32([2, 2]),
)


def test_pair_mean_counts_every_pair_alike():
    np.testing.assert_allclose(sft(POLICY, mean="pair")[0], [2, 2])
    np.testing.assert_allclose(sft(POLICY, mean="pair", over="prompt+chosen")[0], [10 / 5, 10 / 3])


def test_batch_mean_counts_every_token_alike():
    np.testing.assert_allclose(sft(POLICY)[0].mean(), (6 + 2) / (3 + 1))
    np.testing.assert_allclose(sft(POLICY, over="prompt+chosen")[0].mean(), (10 + 10) / (5 + 3))
