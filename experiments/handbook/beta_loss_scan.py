"""The preference-tuning scan: DPO, IPO and KTO on pairs, each at ten betas, for one of two fine-tuned 7B models.

    prefalign train --config=experiments/handbook/beta_loss_scan.py --workdir=DIR
    prefalign train --config=experiments/handbook/beta_loss_scan.py:openhermes --workdir=DIR \\
      --config.loss.name=ipo --config.loss.tau=0.01 --config.loss.per_token=True

is one run of the grid (DPO at its default beta of 0.1; an IPO), and `sweep()` lists all of them. zephyr is
zephyr-7b-sft-full on UltraFeedback, openhermes is OpenHermes-2.5 on Orca pairs.

Source: alignment-handbook, recipes/pref_align_scan: launch_scan.sh (c1ca25b), dpo/config_zephyr.yaml (95dc472) and
config_openhermes.yaml (81c66b2). Mesh: fsdp=8, 8 devices of 80 GB.

Different here: IPO's beta is called tau, and its log-ratios are means per token, as in TRL. kto_pair is twice the
published loss, without its gradient through the KL. The files name no max_length; 1024 is that of the sibling recipe,
zephyr_7b_dpo. Pairs that are too long are cut otherwise, see docs/recipes.md. Not run here at full size.
"""

from prefalign_jax import config

BETAS = (0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def sweep() -> list[dict]:
    """The fields that differ between the runs."""
    runs = []
    for beta in BETAS:
        runs.append({"loss.name": "dpo", "loss.beta": beta})
        runs.append({"loss.name": "kto_pair", "loss.beta": beta})
        runs.append({"loss.name": "ipo", "loss.tau": beta, "loss.per_token": True})
    return runs


def get_config(arg: str = ""):
    arg = config.parse_arg(arg, model=("zephyr", "openhermes"))
    c = config.defaults("dpo")
    c.seed = 42
    if arg.model == "zephyr":
        c.model.path = "alignment-handbook/zephyr-7b-sft-full"
        c.data.path = "HuggingFaceH4/ultrafeedback_binarized"
    else:
        c.model.path = "teknium/OpenHermes-2.5-Mistral-7B"
        c.data.path = "HuggingFaceH4/orca_dpo_pairs"
    c.data.eval_path = c.data.path
    c.data.split, c.data.eval_split = "train_prefs", "test_prefs"

    c.epochs = 1.0
    c.batch_size = 128
    c.micro_steps = 2  # 8 pairs a device
    c.max_length = 1024
    c.too_long = "truncate_response"
    c.learning_rate = 5e-7
    c.schedule = "cosine"
    c.warmup_epochs = 0.1 * c.epochs

    c.dtype = "bfloat16"
    c.model.remat = "full"
    c.mesh.fsdp = -1
    c.eval_steps = c.save_steps = 100
    c.checkpoint.keep = 1
    c.export.dtype = "bfloat16"
    return c
