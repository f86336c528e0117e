"""Zephyr-7B-Gemma: DPO of a fine-tuned Gemma-7B on 7,000 pairs of three sources.

    prefalign train --config=experiments/handbook/zephyr_gemma_dpo.py --workdir=DIR

Source: alignment-handbook, recipes/zephyr-7b-gemma/dpo/config_full.yaml (81c66b2). Mesh: fsdp=8, 8 devices of 80 GB.

Different here: Pairs that are too long are cut otherwise, see docs/recipes.md. Not run here at full size.
"""

from prefalign_jax import config


def get_config():
    c = config.defaults("dpo")
    c.seed = 42
    c.model.path = "HuggingFaceH4/zephyr-7b-gemma-sft-v0.1"  # its tokenizer has ChatML
    c.data.path = c.data.eval_path = "argilla/dpo-mix-7k"
    c.loss.beta = 0.05

    c.epochs = 2.0
    c.batch_size = 128
    c.micro_steps = 8  # 2 pairs a device
    c.max_length = 1024
    c.too_long = "truncate_response"
    c.learning_rate = 5e-7
    c.schedule = "cosine"
    c.warmup_epochs = 0.1 * c.epochs

    c.dtype = "bfloat16"
    c.model.remat = "full"
    c.mesh.fsdp = -1
    c.eval_steps = 100
    c.export.dtype = "bfloat16"
    return c
