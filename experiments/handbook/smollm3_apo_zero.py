"""SmolLM3: APO-zero of the fine-tuned 3B on preferences with and without reasoning traces, 24,576 tokens long.

    hf download HuggingFaceTB/SmolLM3-3B-checkpoints --revision it-SFT --local-dir SFT
    prefalign train --config=experiments/handbook/smollm3_apo_zero.py:model=SFT --workdir=DIR

The default pairs are those without reasoning (no_think); `:think,model=SFT` takes the others.

Source: alignment-handbook, recipes/smollm3/dpo/apo.yaml (19f0345). Mesh: fsdp=8, 8 devices of 80 GB; the published 16
devices with 1 pair each and 2 micro-steps have the same batch.

Different here: published, half of the one set and a quarter of the other are mixed; here it is one set. As there, each
row's chat_template_kwargs turn reasoning on or off. The cosine ends at 0, not at a tenth of the rate. Pairs that are
too long are cut otherwise, see docs/recipes.md. Not run here at full size.
"""

from prefalign_jax import config

SPLITS = {
    "no_think": "llama_3.1_tulu_3_8b_preference_mixture_no_think",
    "think": "tulu_3_8b_pref_mix_Qwen3_32B_Qwen3_0.6B_think",
}


def get_config(arg: str = ""):
    arg = config.parse_arg(arg, pairs=tuple(SPLITS), model=None)
    c = config.defaults("apo_zero")
    c.seed = 42
    c.model.path = arg.model
    c.data.path = "HuggingFaceTB/smoltalk2:Preference"
    c.data.split = SPLITS[arg.pairs]
    c.loss.beta = 0.05

    c.epochs = 1.0
    c.batch_size = 32
    c.micro_steps = 4  # 1 pair a device
    c.max_length = 24576
    c.too_long = "truncate_response"
    c.learning_rate = 1e-6
    c.schedule = "cosine"
    c.warmup_epochs = 0.1 * c.epochs
    c.grad_clip = 0.2

    c.dtype = "bfloat16"
    c.model.remat = "full"
    c.mesh.fsdp = -1
    c.log_steps = 1
    c.checkpoint.keep = 1
    c.export.dtype = "bfloat16"
    return c
