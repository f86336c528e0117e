"""SmolLM2-Instruct in two stages: fine-tuning on SmolTalk, then DPO on UltraFeedback; 1.7B, 360M or 135M.

    prefalign train --config=experiments/handbook/smollm2.py:sft --workdir=runs/smollm2_sft
    prefalign train --config=experiments/handbook/smollm2.py:dpo --workdir=runs/smollm2_dpo \\
      --config.model.path=runs/smollm2_sft/export

The small ones: `:sft,size=135M`, `:dpo,size=135M`, or 360M. Without model.path DPO starts from the published first
stage.

Source: alignment-handbook, recipes/smollm2/sft/config.yaml and config_smol.yaml (0213b5b), dpo/config.yaml (19f0345)
and config_smol.yaml (ae3f44f). Mesh: fsdp=8, 8 devices of 80 GB.

Different here: the published template begins a conversation without a system message with one that names SmolLM; ChatML
here does not. The 1.7B file of dpo mixes the test pairs into training and splits anew; here they are held out. Pairs
that are too long are cut otherwise, see docs/recipes.md. Not run here at full size.
"""

from prefalign_jax import config


def get_config(arg: str = ""):
    arg = config.parse_arg(arg, stage=("sft", "dpo"), size=("1.7B", "360M", "135M"))
    c = config.defaults(arg.stage)
    c.seed = 42
    if arg.stage == "sft":
        c.model.path = f"HuggingFaceTB/SmolLM2-{arg.size}"
        c.data.path = "HuggingFaceTB/smoltalk:all" if arg.size == "1.7B" else "HuggingFaceTB/smol-smoltalk"
        c.data.chat_template = "chatml"
        c.loss.over = "prompt+chosen"
        c.learning_rate = 3e-4 if arg.size == "1.7B" else 1e-3
        c.epochs = 2.0
        c.micro_steps = 4  # 4 conversations a device
        c.max_length = 8192
        c.log_steps = 5
    else:
        c.model.path = f"loubnabnl/smollm2-{arg.size}-sft"
        c.data.path = "HuggingFaceH4/ultrafeedback_binarized"
        c.data.split, c.data.eval_split = "train_prefs", "test_prefs"
        c.loss.beta = 0.5
        c.learning_rate = 1e-6
        c.epochs = 3.0 if arg.size == "1.7B" else 2.0
        c.micro_steps = 8  # 2 pairs a device
        c.max_length = 1024
        c.eval_steps = 100
    c.data.eval_path = c.data.path
    c.batch_size = 128
    c.too_long = "truncate_response"
    c.schedule = "cosine"
    c.warmup_epochs = 0.1 * c.epochs

    c.dtype = "bfloat16"
    c.model.remat = "full"
    c.mesh.fsdp = -1
    c.export.dtype = "bfloat16"
    return c
