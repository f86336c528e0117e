"""The smol course's exercise in DPO: SmolLM2-135M on UltraFeedback or HH-RLHF.

    prefalign train --config=experiments/course/smollm2_dpo.py --workdir=DIR
    prefalign train --config=experiments/course/smollm2_dpo.py:hh_rlhf --workdir=DIR

Another set, or the model of an earlier exercise: --config.data.path=..., --config.model.path=...

Source: huggingface/smol-course, 2_preference_alignment/notebooks/dpo_finetuning_example.ipynb (1836e33) for
ultrafeedback, ja/2_preference_alignment/notebooks/dpo_finetuning_example.ipynb (d3b8d45) for hh_rlhf, which leaves the
rest to TRL's defaults. Mesh: one device.

Different here: hh_rlhf names no max_length; 1024 is TRL's present default. A lower beta is a weaker pull to the
reference, not the more cautious model that the course's comment promises. Pairs that are too long are cut otherwise,
see docs/recipes.md. Not run here at full size.
"""

from prefalign_jax import config


def get_config(arg: str = ""):
    arg = config.parse_arg(arg, data=("ultrafeedback", "hh_rlhf"))
    c = config.defaults("dpo")
    c.seed = 42
    c.loss.beta = 0.1
    c.learning_rate = 5e-5
    c.too_long = "truncate_response"
    if arg.data == "ultrafeedback":
        c.model.path = "HuggingFaceTB/SmolLM2-135M-Instruct"
        c.data.path = "trl-lib/ultrafeedback_binarized"
        c.steps = 200
        c.schedule = "cosine"
        c.warmup_steps = 100
        c.batch_size = 16
        c.micro_steps = 4
        c.max_length = 1536
        c.dtype = "bfloat16"
        c.model.remat = "full"
        c.log_steps = 1
    else:
        c.model.path = "HuggingFaceTB/SmolLM2-135M"
        c.data.path = c.data.eval_path = "Anthropic/hh-rlhf"
        c.epochs = 3.0
        c.schedule = "linear"
        c.batch_size = 4
        c.max_length = 1024
        c.log_steps = 10
        c.save_steps = 100
    return c
