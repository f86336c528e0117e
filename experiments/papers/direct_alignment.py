"""One stage or SFT first, pairwise or pointwise, which beta: eight methods that differ in these alone.

    prefalign train --workdir=runs/direct_pairs --config.on_policy.limit=200 \\
      --config=experiments/papers/frontier.py:method=pairs,model=TinyStories-656K
    for share in 0.05 0.1 1.0; do prefalign train --workdir=runs/direct_sft/$share \\
      --config=experiments/papers/direct_alignment.py:method=sft,share=$share,model=TinyStories-656K; done
    prefalign sweep --workdir=runs/direct --together=auto \\
      --config=experiments/papers/direct_alignment.py:model=TinyStories-656K
    python scripts/direct_alignment.py runs/direct --sft=runs/direct_sft

Gorbatovski et al., arXiv 2502.01237, compare direct alignment algorithms so. Here the policy is a pretrained model of
stories for children, the reward is known ("kindness", judges/rewards.py) and so are its noisy labels; SFT is on the
chosen responses, of all pairs or of a share of them. With data=HH-RLHF in place of pairs=, held-out pairs are what is
measured, and nothing is sampled. Accuracies of losses with a reference and without one are of two kinds, so

    python scripts/direct_alignment.py runs/direct_hh --since=TinyStories-656K

measures all of them by what the responses have gained since that model.

ORPO and ASFT have their SFT term in one stage and none after SFT, as there. KTO is the form for pairs, so that all
methods take as many steps over the same pairs. The strengths are three each, the same for the methods that share a
scale.

Time: an hour and a half for all 320 runs on two cores, of either kind. Results (docs/results.md): with the known
reward SFT first helps every method, ORPO most, and after it DPO and ORPO are alike. On HH-RLHF it helps none, and
whether DPO or ORPO lies higher depends on whether gains are summed over a response or taken per token.
"""

from pathlib import Path

from prefalign_jax import config

# Method -> (loss, whether it compares the two responses of a pair, field of its strength, values).
METHODS = {
    "dpo": ("dpo", True, "beta", (0.05, 0.2, 1.0)),
    "ipo": ("ipo", True, "tau", (0.05, 0.2, 1.0)),
    "orpo": ("orpo_beta", True, "beta", (0.2, 1.0, 5.0)),
    "simpo": ("simpo", True, "beta", (1.0, 3.0, 10.0)),
    "asft": ("asft", False, "beta", (0.2, 1.0, 5.0)),
    "kto": ("kto_pair", False, "beta", (0.05, 0.2, 1.0)),
    "nca": ("nca", False, "beta", (0.05, 0.2, 1.0)),
    "apo_zero": ("apo_zero", False, "beta", (0.05, 0.2, 1.0)),
}
SHARES = (0.0, 0.05, 0.1, 1.0)  # of the pairs, on whose chosen responses SFT comes first
SEEDS = 5


def get_config(arg: str = ""):
    arg = config.parse_arg(
        arg,
        method=("dpo", "sft", *METHODS),
        share=0.0,
        model=None,
        sft="runs/direct_sft",
        pairs="runs/direct_pairs/pairs.jsonl",
        data=None,
    )
    loss = "sft" if arg.method == "sft" else METHODS[arg.method][0]
    c = config.defaults(loss)
    c.model.path = arg.model
    if arg.method != "sft" and arg.share:
        c.model.path = str(Path(arg.sft) / str(arg.share) / "export")
        if arg.method in ("orpo", "asft"):
            c.loss.sft_weight = 0.0
    c.data.path = arg.data or arg.pairs
    if arg.data:
        c.data.eval_fraction, c.data.eval_seed = 0.25, 0  # of the prompts, the same for all seeds
        c.data.ascii_quotes = True  # small vocabularies lack curly quotes
        c.max_length = 192
    else:
        c.samples.reward = "kindness"
        c.samples.prompts = str(Path(__file__).with_name("openings_test.jsonl"))
        c.samples.max_new_tokens = 48
        c.max_length = 128
    if arg.method == "sft" and arg.share < 1:
        c.data.mix = ({"path": c.data.path, "fraction": arg.share},)
        c.data.path = None
    c.batch_size = 64 if arg.method != "sft" else 16  # 5% of the pairs are 44
    c.epochs = 1.0
    c.learning_rate = 5e-4
    c.warmup_steps = 5 if arg.method != "sft" else 2
    c.schedule = "constant"
    c.eval_steps = 9  # of 18
    c.export.enabled = arg.method == "sft"
    return c


def sweep():
    for share in sorted(SHARES, key=lambda share: share not in (0.0, 1.0)):  # the ends first: they have all strengths
        for method, (_, _, field, values) in METHODS.items():
            for value in values if share in (0.0, 1.0) else values[1:2]:
                for seed in range(SEEDS):
                    yield {"config": f"method={method},share={share}", f"loss.{field}": value, "seed": seed}
