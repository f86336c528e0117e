"""Constitutional AI with an open model: Mistral-7B is fine-tuned, then aligned, on answers that it revised itself.

    prefalign train --config=experiments/handbook/constitutional_ai.py:sft --workdir=runs/cai_sft \\
      --config.data.path=CHATS --config.data.eval_path=CHATS
    prefalign train --config=experiments/handbook/constitutional_ai.py:dpo --workdir=runs/cai_dpo \\
      --config.model.path=runs/cai_sft/export --config.data.path=PAIRS --config.data.eval_path=PAIRS

Each stage is published with two sets, all of either: HuggingFaceH4/cai-conversation-harmless and ultrachat_200k for
CHATS, the former and ultrafeedback_binarized for PAIRS. A directory with the Parquet files of both, each set in a
folder of its own, is read as one set; without the paths a stage takes cai-conversation-harmless alone. Without
model.path DPO starts from the published first stage.

Source: alignment-handbook, recipes/constitutional-ai/sft/config_anthropic.yaml (95dc472) and
dpo/config_anthropic.yaml (298f806). Mesh: fsdp=8, 8 devices of 80 GB.

Different here: a row that has both `chosen` and `messages` is fine-tuned on `chosen`. Pairs that are too long are cut
otherwise, see docs/recipes.md. Not run here at full size.
"""

from prefalign_jax import config


def get_config(arg: str = ""):
    arg = config.parse_arg(arg, stage=("sft", "dpo"))
    c = config.defaults(arg.stage)
    c.seed = 42
    c.data.path = c.data.eval_path = "HuggingFaceH4/cai-conversation-harmless"
    if arg.stage == "sft":
        c.model.path = "mistralai/Mistral-7B-v0.1"
        c.data.chat_template = "zephyr"
        c.data.split, c.data.eval_split = "train_sft", "test_sft"
        c.loss.over = "prompt+chosen"
        c.learning_rate = 2e-5
        c.schedule = "cosine"
        c.epochs = 1.0
        c.batch_size = 256
        c.micro_steps = 4  # 8 conversations a device
        c.max_length = 2048
        c.log_steps = 5
    else:
        c.model.path = "alignment-handbook/mistral-7b-sft-constitutional-ai"
        c.data.split, c.data.eval_split = "train_prefs", "test_prefs"
        c.loss.beta = 0.1
        c.optimizer.name = "rmsprop"
        c.learning_rate = 5e-7
        c.schedule = "linear"
        c.epochs = 3.0
        c.batch_size = 16  # 2 pairs a device
        c.max_length = 1024
        c.eval_steps = 1000
    c.too_long = "truncate_response"
    c.warmup_epochs = 0.1 * c.epochs

    c.dtype = "bfloat16"
    c.model.remat = "full"
    c.mesh.fsdp = -1
    c.save_steps = 100
    c.checkpoint.keep = 1
    c.export.dtype = "bfloat16"
    return c
