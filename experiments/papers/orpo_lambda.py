"""ORPO, Figures 3 and 7: SFT raises the rejected responses' probability too; ORPO lowers it, the more with lambda.

    prefalign sweep --workdir=runs/orpo_lambda --together=auto \\
      --config=experiments/papers/orpo_lambda.py:model=TinyStories-656K,data=harmless-base/test.jsonl.gz
    prefalign report runs/orpo_lambda

Hong et al., arXiv 2403.07691: Figure 3 (SFT on HH-RLHF), Figure 7 (lambda 0.1, 0.5, 1.0) and appendix B (the ratio of
probabilities in place of odds). lambda = 0 is SFT. Read logps/chosen and logps/rejected, means per token of held-out
pairs.

Time: half an hour of processor time for the 40 runs. Result (docs/results.md): SFT raises the rejected responses by
1.15 nats a token; against SFT, lambda 0.1, 0.5, 1.0 lower them by 0.008, 0.043, 0.096, the chosen ones nearly as much,
and the log odds ratio grows by 0.001, 0.005, 0.010; the ratio of probabilities does what that of odds does, to 0.002.
"""

from prefalign_jax import config


def get_config(arg: str = ""):
    arg = config.parse_arg(arg, model=None, data="Anthropic/hh-rlhf:harmless-base")
    c = config.defaults("orpo")
    c.model.path = arg.model
    c.data.path = arg.data
    c.data.eval_fraction = 0.25  # of the prompts
    c.data.ascii_quotes = True  # small vocabularies lack curly quotes
    c.max_length = 192
    c.batch_size = 32
    c.epochs = 2.0
    c.learning_rate = 5e-4
    c.schedule = "cosine"
    c.warmup_steps = 5
    c.eval_steps = 10
    c.export.enabled = False
    return c


def sweep():
    settings = [(0.0, "odds"), (0.1, "odds"), (0.5, "odds"), (1.0, "odds"), (1.0, "probability")]
    return [{"loss.lam": lam, "loss.ratio": ratio, "seed": seed} for lam, ratio in settings for seed in range(8)]
