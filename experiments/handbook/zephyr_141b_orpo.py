"""Zephyr-141B-A35b: ORPO of Mixtral-8x22B, not fine-tuned before, on 7,000 conversations.

    prefalign train --config=experiments/handbook/zephyr_141b_orpo.py --workdir=DIR

Source: alignment-handbook, recipes/zephyr-141b-A35b/orpo/config_full.yaml (95dc472). Its `beta` is the paper's lambda;
its NLL is TRL's, over prompt and chosen response and as a mean over the batch's tokens.
Mesh: fsdp=32, 32 devices of 80 GB in one process: a run has one process for now, so several hosts must wait.

Different here: AdamW keeps both moments in float32, where the published one has 8 bits, and the weights are float32,
for at this rate bfloat16 weights would round most updates away; the state then fills most of a device, and whether the
rest is enough for activations has not been measured. Pairs that are too long are cut otherwise, see docs/recipes.md.
Not run here at full size.
"""

from prefalign_jax import config


def get_config():
    c = config.defaults("orpo")
    c.seed = 42
    c.model.path = "mistral-community/Mixtral-8x22B-v0.1"
    c.data.path = "argilla/distilabel-capybara-dpo-7k-binarized"
    c.data.chat_template = "zephyr"
    c.loss.lam = 0.05
    c.loss.nll_over = "prompt+chosen"
    c.loss.nll_mean = "batch"

    c.epochs = 3.0
    c.batch_size = 32  # 1 pair a device
    c.max_length = 2048
    c.too_long = "truncate_response"
    c.learning_rate = 5e-6
    c.schedule = "inverse_sqrt"
    c.warmup_steps = 100

    c.dtype = "bfloat16"
    c.model.remat = "full"
    c.mesh.fsdp = -1
    c.export.dtype = "bfloat16"
    return c
