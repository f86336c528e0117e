"""ORPO on Anthropic's HH-RLHF: raw transcripts, the prompt up to the last "\\n\\nAssistant:" of both sides.

    prefalign train --workdir=DIR \\
      --config=experiments/orpo_hh_rlhf.py:model=PATH_OR_HUB_NAME,data=Anthropic/hh-rlhf:harmless-base

`data` may be a file as well, such as harmless-base/test.jsonl.gz; a share of its prompts is then held out, and no
prompt is on both sides. `small` sets the learning rate for models of about a million parameters: `:small,model=...`.

Seen with TinyStories-656K on harmless-base/test.jsonl.gz (`:small`, 142 steps): held-out NLL 5.217 to 3.908, accuracy
0.527 to 0.575 (95% interval 0.531 to 0.617) on 510 pairs.
"""

from prefalign_jax import config


def get_config(arg: str = ""):
    arg = config.parse_arg(arg, size=("large", "small"), model=None, data="Anthropic/hh-rlhf", eval_fraction=0.25)
    c = config.defaults("orpo")
    c.model.path = arg.model
    c.data.path = arg.data
    c.data.eval_fraction = arg.eval_fraction  # of the prompts
    c.data.ascii_quotes = arg.size == "small"  # small vocabularies lack curly quotes
    c.loss.lam = 0.1
    c.max_length = 512
    c.too_long = "drop"
    c.batch_size = 32
    c.epochs = 3.0 if arg.size == "small" else 1.0
    c.learning_rate = 3e-4 if arg.size == "small" else 8e-6
    c.schedule = "cosine"
    c.warmup_steps = 15
    c.eval_steps = 25
    c.save_steps = 25
    return c
