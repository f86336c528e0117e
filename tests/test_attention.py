import jax.numpy as jnp
import numpy as np

from prefalign_jax.models.attention import attend, tree_mask


def test_attend_equals_a_loop_over_heads_and_rows():
    rng = np.random.default_rng(0)
    rows, length, heads, kv_heads, dim = 2, 5, 6, 2, 4
    q = rng.normal(size=(rows, length, heads, dim))
    k, v = rng.normal(size=(2, rows, length, kv_heads, dim))
    mask = np.tril(rng.random((rows, length, length)) < 0.7) | np.eye(length, dtype=bool)
    wanted = np.zeros_like(q)
    for r in range(rows):
        for h in range(heads):
            for i in range(length):
                seen = np.flatnonzero(mask[r, i])
                scores = k[r, seen, h // 3] @ q[r, i, h] / np.sqrt(dim)
                weights = np.exp(scores) / np.exp(scores).sum()
                wanted[r, i, h] = weights @ v[r, seen, h // 3]
    got = attend(*(jnp.float32(x) for x in (q, k, v)), jnp.asarray(mask))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_rejected_token_sees_the_prompt_and_its_own_branch_only():
    #                   prompt  chosen  rejected  next pair  padding
    segments = np.array([[1, 1, 1, 1, 1, 1, 2, 2, 0]])
    branches = np.array([[0, 0, 1, 1, 2, 2, 0, 2, 0]])
    sees = tree_mask(jnp.asarray(segments), jnp.asarray(branches))[0]
    assert [np.flatnonzero(row).tolist() for row in sees] == [
        *[[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5], [6], [6, 7], [8]],
    ]
