"""ORPO of any model on any preference data: preference and imitation in one stage, without a reference.

    prefalign train --config=experiments/orpo.py:model=PATH_OR_HUB_NAME,data=PATH_OR_HUB_NAME --workdir=DIR

loss.lam is the paper's lambda (TRL calls it beta). For TRL's numbers: --config.loss.nll_over=prompt+chosen
--config.loss.nll_mean=batch. nll_loss falls as in fine-tuning; log_odds_chosen rises from about 0.
"""

from prefalign_jax import config


def get_config(arg: str = ""):
    arg = config.parse_arg(arg, model=None, data=None)
    c = config.defaults("orpo")
    c.model.path = arg.model
    c.data.path = arg.data
    c.loss.lam = 0.1
    c.learning_rate = 8e-6  # arXiv 2403.07691, section 5.1
    c.schedule = "linear"
    c.warmup_steps = 10
    c.batch_size = 16
    return c
