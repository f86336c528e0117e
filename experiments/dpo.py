"""DPO of any model on any preference data.

    prefalign train --config=experiments/dpo.py:model=PATH_OR_HUB_NAME,data=PATH_OR_HUB_NAME --workdir=DIR

The loss starts at log 2 = 0.6931 and falls; rewards/accuracies rises above 0.5. Evaluate on data.eval_path, or hold out
part of the prompts: --config.data.eval_fraction=0.05. Any other loss of docs/losses.md: `:loss=ipo,model=...`. Losses
of single completions (kto) take rows of prompt, completion and label, or preference rows, each of which gives two;
bradley_terry trains a reward model.
"""

from prefalign_jax import config


def get_config(arg: str = ""):
    arg = config.parse_arg(arg, loss="dpo", model=None, data=None)
    c = config.defaults(arg.loss)
    c.model.path = arg.model
    c.data.path = arg.data
    c.learning_rate = 1e-6  # full fine-tuning of an instruction-tuned model; 5e-7 is the papers' for 7B
    c.schedule = "linear"
    c.batch_size = 16
    return c
