"""A language model aligned in minutes, with no network and no file from outside.

    prefalign train --config=experiments/quickstart.py          # DPO
    prefalign train --config=experiments/quickstart.py:orpo
    prefalign sweep --config=experiments/quickstart.py --workdir=runs/sweep    # both, over three seeds

Generates a corpus with a known true reward, trains a tokenizer and a small Llama-shaped model on it, aligns the model
on noisy preference pairs, and prints what changed on held-out prompts.

Seen on 2 CPU cores: DPO 55 s, true reward +0.13 to +3.77, held-out accuracy 0.921; ORPO 30 s more, to +1.55, 0.733.
"""

from prefalign_jax import config


def get_config(arg: str = ""):
    arg = config.parse_arg(arg, loss=("dpo", "orpo", "ipo", "hinge"))
    c = config.defaults(arg.loss)
    c.job = "quickstart"
    c.batch_size = 32
    c.max_length = 128
    c.epochs = 2.0
    c.schedule = "cosine"
    c.warmup_steps = 10
    if arg.loss == "orpo":
        c.loss.lam = 1.0
        c.learning_rate = 1e-3
    else:
        c.learning_rate = 3e-4
    c.log_steps = 5
    c.eval_steps = 40
    with c.unlocked():
        # Sizes of the world and of the model.
        c.quickstart = dict(texts=4000, demonstrations=3000, pairs=2400, vocabulary=512, hidden=96, layers=2, heads=4)
    return c


def sweep():
    """DPO against ORPO over three seeds, each with a world, a tokenizer and a model of its own."""
    return [{"config": loss, "seed": seed} for loss in ("dpo", "orpo") for seed in range(3)]
