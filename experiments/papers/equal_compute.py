"""DPO, SFT then DPO, and ORPO on HH-RLHF at equal data, equal steps and equal compute.

    prefalign sweep --workdir=runs/equal_compute --together=auto \\
      --config=experiments/papers/equal_compute.py:model=TinyStories-656K,data=harmless-base/test.jsonl.gz
    prefalign report runs/equal_compute

Every method takes as many steps in all over the same pairs; SFT then DPO divides them evenly. metrics.jsonl counts the
operations of every step, so that the report can compare at equal compute as well. ORPO's "half the forward passes"
(arXiv 2403.07691, section 7.3) counts forward passes alone: with the backward pass as two forwards DPO takes 8 a pair,
6 where reference log-probabilities are cached, and ORPO 6.

Time: 30 minutes of processor time for the 32 runs. Result (docs/results.md): accuracies of 0.606 for DPO and for SFT
then DPO, and 0.578 for ORPO, at equal data, steps and compute; eight seeds almost tell ORPO apart. Forward passes are
2.00 to 1, whole steps 1.30 to 1, and with the cache 1 to 1.
"""

from prefalign_jax import config

METHODS = ("dpo", "dpo_cached", "sft_dpo", "orpo")
EPOCHS = 2.0


def get_config(arg: str = ""):
    arg = config.parse_arg(arg, method=METHODS, model=None, data="Anthropic/hh-rlhf:harmless-base")
    c = config.defaults("orpo" if arg.method == "orpo" else "dpo")
    c.model.path = arg.model
    c.data.path = arg.data
    c.data.eval_fraction = 0.25  # of the prompts
    c.data.ascii_quotes = True  # small vocabularies lack curly quotes
    c.max_length = 192
    c.batch_size = 32
    c.epochs = EPOCHS
    c.learning_rate = 3e-4
    c.schedule = "cosine"
    c.warmup_steps = 5
    c.eval_steps = 10
    if arg.method == "dpo_cached":
        c.reference.kind = "cached"
    elif arg.method == "sft_dpo":
        c.job = "sft_first"
        c.sft.epochs, c.sft.learning_rate = EPOCHS / 2, 5e-4
        c.epochs = EPOCHS / 2
    elif arg.method == "orpo":
        c.loss.lam = 0.5
        c.learning_rate = 5e-4
    return c


def sweep():
    return [{"config": f"method={method}", "seed": seed} for method in METHODS for seed in range(8)]
