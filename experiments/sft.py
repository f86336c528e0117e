"""Supervised fine-tuning of any model: prompts with completions, message lists, or the chosen side of pairs.

    prefalign train --config=experiments/sft.py:model=PATH_OR_HUB_NAME,data=PATH_OR_HUB_NAME --workdir=DIR

nll_loss falls from the base model's. Trained on the response alone; --config.loss.over=prompt+chosen adds the prompt.
"""

from prefalign_jax import config


def get_config(arg: str = ""):
    arg = config.parse_arg(arg, model=None, data=None)
    c = config.defaults("sft")
    c.model.path = arg.model
    c.data.path = arg.data
    c.learning_rate = 2e-5
    c.schedule = "cosine"
    c.batch_size = 16
    return c
