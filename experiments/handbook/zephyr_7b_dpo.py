"""Zephyr-7B: DPO of a fine-tuned Mistral-7B on UltraFeedback, all weights (full) or adapters over 4-bit ones (qlora).

    prefalign train --config=experiments/handbook/zephyr_7b_dpo.py --workdir=DIR
    prefalign train --config=experiments/handbook/zephyr_7b_dpo.py:qlora --workdir=DIR

Source: alignment-handbook, recipes/zephyr-7b-beta/dpo/config_full.yaml (81c66b2) and config_qlora.yaml (95dc472). The
paper, arXiv 2310.16944, has beta 0.1 and 3 epochs instead: --config.loss.beta=0.1 --config.epochs=3.
Mesh: fsdp=8, 8 devices of 80 GB.

Different here: Pairs that are too long are cut otherwise, see docs/recipes.md. qlora began with the adapters of
zephyr-7b-sft-qlora merged into Mistral-7B; here with zephyr-7b-sft-full, or what --config.model.path names. Its AdamW
was paged, which changes where it lies, not what it does. Not run here at full size.
"""

from prefalign_jax import config


def get_config(arg: str = ""):
    arg = config.parse_arg(arg, weights=("full", "qlora"))
    c = config.defaults("dpo")
    c.seed = 42
    c.model.path = "alignment-handbook/zephyr-7b-sft-full"
    c.data.path = c.data.eval_path = "HuggingFaceH4/ultrafeedback_binarized"
    c.data.split, c.data.eval_split = "train_prefs", "test_prefs"
    c.loss.beta = 0.01

    c.epochs = 1.0
    c.batch_size = 128
    c.max_length = 1024
    c.too_long = "truncate_response"
    c.schedule = "cosine"
    c.warmup_epochs = 0.1 * c.epochs
    if arg.weights == "full":
        c.learning_rate = 5e-7
        c.micro_steps = 2  # 8 pairs a device
    else:
        c.learning_rate = 5e-6
        c.micro_steps = 4  # 4 pairs a device
        c.model.quantize = "nf4"
        c.lora.rank = 128
        c.lora.alpha = 128.0
        c.lora.dropout = 0.05
        c.lora.targets = r"layers/(attention|mlp)/\w+"  # all seven linear maps of a layer

    c.dtype = "bfloat16"
    c.model.remat = "full"
    c.mesh.fsdp = -1
    c.eval_steps = c.save_steps = 100
    c.checkpoint.keep = 1
    c.export.dtype = "bfloat16"
    return c
