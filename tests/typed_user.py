"""What a type checker sees of the package where it is used: `mypy` checks this file, and nothing runs it."""

from typing import assert_type

import prefalign_jax as pa

ROW = {"prompt": "Hi", "chosen": " Hello!", "rejected": " Go away."}


def use() -> str:
    """The README's example."""
    try:
        policy = pa.load("MODEL")
    except pa.UserError as error:
        return str(error)
    assert_type(policy, pa.Policy)
    pairs = pa.tokenize([ROW], policy.tokenizer)
    assert_type(pairs, pa.Pairs)
    logps = pa.logps(policy, pairs)
    assert_type(logps, pa.PairLogps)
    loss, metrics = pa.losses.dpo(logps, logps, beta=0.1)
    result = pa.train(pa.experiment("dpo", steps=10), "runs/typed", data=[ROW])
    assert_type(result, pa.Result)
    assert_type(result.step, int)
    assert_type(result.after, dict[str, float])
    return f"{loss} {sorted(metrics)}"
