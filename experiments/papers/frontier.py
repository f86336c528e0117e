"""DPO, Figure 2: how much reward each method buys for how much divergence, with a reward that is known.

    prefalign train --workdir=runs/frontier_pairs \\
      --config=experiments/papers/frontier.py:method=pairs,model=TinyStories-656K
    prefalign sweep --workdir=runs/frontier --together=auto \\
      --config=experiments/papers/frontier.py:model=TinyStories-656K
    python scripts/frontier.py runs/frontier --pairs=runs/frontier_pairs/pairs.jsonl

Rafailov et al., arXiv 2305.18290, section 6.1. There a sentiment classifier is the true reward of GPT-2-large's film
reviews; here a count of kind and unkind words ("kindness", judges/rewards.py) is that of a pretrained model's stories
for children. The first command draws 4 stories for each of 400 openings from the model and labels all 6 pairs of each
by the reward with Bradley-Terry noise; the second trains each method on them, several strengths and seeds, and measures
reward and exact sequence KL on samples of 160 other openings on the way; the third plots the frontier.

Time: 30 s for the pairs, an hour of processor time for the 104 runs. Result (docs/results.md): from a reward of 0.020,
DPO buys more than every other trained method up to 0.5 nats, and at 2 nats (0.045 there) more than all but ORPO
(0.041); KTO goes furthest, to 0.064 at 5 nats; preferred-FT buys least; best of 4 has 0.054 at 0.6 nats.
"""

from pathlib import Path

from prefalign_jax import config

# Method -> (loss, field of its strength, values), as the paper's betas and alphas where it has them.
METHODS = {
    "dpo": ("dpo", "beta", (0.05, 0.1, 1.0, 5.0)),
    "ipo": ("ipo", "tau", (0.1, 1.0)),
    "kto": ("kto", "beta", (0.1,)),
    "simpo": ("simpo", "beta", (2.5, 10.0)),
    "orpo": ("orpo", "lam", (1.0, 10.0)),
    "unlikelihood": ("unlikelihood", "alpha", (0.5,)),
    "preferred_ft": ("sft", None, (None,)),
}


def get_config(arg: str = ""):
    arg = config.parse_arg(arg, method=("dpo", "pairs", *METHODS), model=None, pairs="runs/frontier_pairs/pairs.jsonl")
    c = config.defaults("dpo" if arg.method == "pairs" else METHODS[arg.method][0])
    c.model.path = arg.model
    c.samples.reward = "kindness"
    c.samples.max_new_tokens = 48
    c.max_length = 128
    if arg.method == "pairs":
        c.job = "pairs"
        c.on_policy.prompts = str(Path(__file__).with_name("openings_train.jsonl"))
        c.on_policy.per_prompt = 4
        c.on_policy.pairing = "all"
        c.on_policy.labels = "bradley_terry"
        c.on_policy.sharpness = 40.0
        return c
    c.data.path = arg.pairs
    c.samples.prompts = str(Path(__file__).with_name("openings_test.jsonl"))
    c.batch_size = 64
    c.epochs = 1.0
    c.learning_rate = 5e-4
    c.warmup_steps = 5
    c.schedule = "constant"
    c.eval_steps = 12
    c.export.enabled = False
    return c


def sweep():
    for method, (_, field, values) in METHODS.items():
        for value in values:
            strength = {f"loss.{field}": value} if field else {}
            for seed in range(8):
                yield {"config": f"method={method}", **strength, "seed": seed}
