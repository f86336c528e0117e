"""The smol course's exercise in ORPO: SmolLM2-135M, not fine-tuned before, on UltraFeedback, a mix or HH-RLHF.

    prefalign train --config=experiments/course/smollm2_orpo.py --workdir=DIR
    prefalign train --config=experiments/course/smollm2_orpo.py:orpo_dpo_mix --workdir=DIR
    prefalign train --config=experiments/course/smollm2_orpo.py:hh_rlhf --workdir=DIR

A subset: --config.data.limit=2000. Another set: --config.data.path=...

Source: huggingface/smol-course, 2_preference_alignment/notebooks/orpo_finetuning_example.ipynb (1d8cbea) for
ultrafeedback and orpo_dpo_mix, ja/2_preference_alignment/notebooks/orpo_finetuning_example.ipynb (d3b8d45) for hh_rlhf,
which leaves the rest to TRL's defaults. TRL's `beta` is the paper's lambda; the `orpo_alpha` and `orpo_beta` of the
course's text exist nowhere. The NLL is TRL's, over prompt and chosen response and as a mean over the batch's tokens.
Mesh: one device.

Different here: on a GPU the published AdamW is paged and keeps its moments in 8 bits, here in float32. orpo_dpo_mix has
no test pairs, so 2% of its prompts are held out. Pairs that are too long are cut otherwise, see docs/recipes.md. Not
run here at full size.
"""

from prefalign_jax import config

PATHS = {
    "ultrafeedback": "trl-lib/ultrafeedback_binarized",
    "orpo_dpo_mix": "mlabonne/orpo-dpo-mix-40k",
    "hh_rlhf": "Anthropic/hh-rlhf",
}


def get_config(arg: str = ""):
    arg = config.parse_arg(arg, data=tuple(PATHS))
    c = config.defaults("orpo")
    c.seed = 42
    c.model.path = "HuggingFaceTB/SmolLM2-135M"
    c.data.path = PATHS[arg.data]
    if arg.data == "orpo_dpo_mix":
        c.data.eval_fraction = 0.02
    else:
        c.data.eval_path = c.data.path
    c.loss.lam = 0.1
    c.loss.nll_over = "prompt+chosen"
    c.loss.nll_mean = "batch"
    c.schedule = "linear"
    c.max_length = 1024
    c.too_long = "truncate_response"
    if arg.data == "hh_rlhf":  # plain text, so no chat template
        c.learning_rate = 5e-5
        c.epochs = 3.0
        c.batch_size = 4
        c.log_steps = 10
        c.save_steps = 100
    else:
        c.data.chat_template = "chatml"
        c.learning_rate = 8e-6
        c.epochs = 1.0
        c.warmup_steps = 10
        c.batch_size = 8
        c.micro_steps = 4
        c.log_steps = 1
        c.eval_steps = 1554  # a fifth of an epoch of UltraFeedback
    return c
