"""DPO against ORPO over three seeds, of any model on any preference data; each at the learning rate of its paper.

    prefalign sweep --config=experiments/dpo_vs_orpo.py:model=PATH_OR_HUB_NAME,data=PATH_OR_HUB_NAME \\
      --workdir=DIR
    prefalign report DIR

Held-out prompts are drawn by the seed, so intervals over seeds take in which prompts were held out. `small` sets the
learning rate for models of about a million parameters: `:small,model=...`.
"""

from prefalign_jax import config


def get_config(arg: str = ""):
    arg = config.parse_arg(
        arg, size=("large", "small"), loss=("dpo", "orpo"), model=None, data=None, eval_fraction=0.25
    )
    c = config.defaults(arg.loss)
    c.model.path = arg.model
    c.data.path = arg.data
    c.data.eval_fraction = arg.eval_fraction  # of the prompts
    c.data.ascii_quotes = arg.size == "small"  # small vocabularies lack curly quotes
    c.learning_rate = 3e-4 if arg.size == "small" else {"dpo": 1e-6, "orpo": 8e-6}[arg.loss]
    c.schedule = "cosine"
    c.warmup_steps = 15
    c.batch_size = 32
    c.max_length = None if arg.size == "small" else 512  # None: the model's positions, and at most 1024
    c.eval_steps = 10
    c.save_steps = 50
    c.export.enabled = False  # the numbers are wanted, not six models
    return c


def sweep():
    return [{"config": f"loss={loss}", "seed": seed} for loss in ("dpo", "orpo") for seed in range(3)]
