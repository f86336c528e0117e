"""One side of `benchmark.py train`: EasyDeL's DPOTrainer or ORPOTrainer. Reads a specification, prints JSON.

Runs in EasyDeL's environment, without this package. Pairs are given as the columns that EasyDeL's tokenization would
make. Prompts and responses are padded to the longest of the run, in multiples of 64: EasyDeL pads to a fixed length.
"""

import json
import sys
import tempfile
import time
from importlib.metadata import version
from types import SimpleNamespace

import datasets
import easydel
import jax
import jax.numpy as jnp
import numpy as np
from jax_device import device_figures

IGNORED = -100  # the label of what is not trained on


def columns(prompt: list[int], chosen: list[int], rejected: list[int], left: int, whole: int) -> dict[str, list[int]]:
    """A pair's row: the prompt padded on its left to `left`, for DPO; prompt and response on their right to `whole`."""
    before = [0] * (left - len(prompt))
    row = {"prompt_input_ids": before + prompt, "prompt_attention_mask": before + [1] * len(prompt)}
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        after = whole - len(prompt) - len(response)
        row[f"{name}_input_ids"] = prompt + response + [0] * after
        row[f"{name}_attention_mask"] = [1] * (whole - after) + [0] * after
        row[f"{name}_labels"] = [IGNORED] * len(prompt) + response + [IGNORED] * after
    return row


class Watch:
    """Keeps times and metrics of a trainer, which waits for every step itself, as the other sides do."""

    def __init__(self, **options):
        self.began, self.ended, self.metrics, self.compiled = [], [], [], []
        jax.monitoring.register_event_duration_secs_listener(
            lambda name, *_, **__: self.compiled.append(name) if name.endswith("backend_compile_duration") else None
        )
        super().__init__(**options)

    def clocks(self) -> tuple[float, float, int]:
        """Seconds, processor seconds, programs compiled."""
        return time.perf_counter(), time.process_time(), len(self.compiled)

    def on_step_start(self, state, step):
        """Before the batch is padded."""
        self.began.append(self.clocks())
        return super().on_step_start(state, step)

    def on_step_end(self, state, metrics, step):
        """After the loss was read."""
        self.ended.append(self.clocks())
        self.metrics.append(metrics)
        return super().on_step_end(state, metrics, step)


def main() -> None:
    """Trains a few steps."""
    spec = json.loads(sys.argv[1])
    orpo = spec["loss"] == "orpo"
    make_config = easydel.ORPOConfig if orpo else easydel.DPOConfig
    make_trainer = type("Trainer", (Watch, easydel.ORPOTrainer if orpo else easydel.DPOTrainer), {})
    with open(spec["pairs"], encoding="utf-8") as file:
        sides = json.load(file)
    used = {name: rows[: spec["steps"] * spec["size"]] for name, rows in sides.items()}
    pairs = list(zip(*used.values(), strict=True))
    sizes = [(len(prompt), max(map(len, two)), len(prompt) + max(map(len, two))) for prompt, *two in pairs]
    left, right, whole = (-(-max(size) // 64) * 64 for size in zip(*sizes, strict=True))
    rows = [columns(*pair, left, whole) for pair in pairs]
    checkpointing = easydel.EasyDeLGradientCheckPointers
    model = easydel.AutoEasyDeLModelForCausalLM.from_pretrained(
        spec["model"],
        dtype=jnp.dtype(spec["dtype"]),
        param_dtype=jnp.dtype(spec["param_dtype"]),
        config_kwargs=dict(
            attn_mechanism="vanilla",  # what EasyDeL chooses on a CPU
            attn_dtype=jnp.dtype(spec["dtype"]),  # else bfloat16 whatever the model's
            gradient_checkpointing=checkpointing.NONE if spec["remat"] == "none" else checkpointing.NOTHING_SAVEABLE,
        ),
        verbose=False,
    )
    with tempfile.TemporaryDirectory() as scratch:
        options = dict(save_directory=scratch, do_last_save=False, resume_if_possible=False, use_wandb=False)
        options |= dict(learning_rate=spec["learning_rate"], weight_decay=0.0, beta=0.1, padding_value=0)
        options |= dict(total_batch_size=spec["size"], max_training_steps=spec["steps"], num_train_epochs=1)
        options |= dict(max_prompt_length=left, max_completion_length=right, max_length=left + right)
        trainer = make_trainer(
            arguments=make_config(shuffle_train_dataset=False, **options),
            model=model,
            processing_class=SimpleNamespace(pad_token_id=0),
            train_dataset=datasets.Dataset.from_list(rows),
        )
        if not orpo:  # of the reference, since DPO's metrics lack them
            trainer.concatenated_forward = None  # in 0.3.0 the jitted one declares a tuple and returns a dictionary
            with trainer.mesh:
                chosen, _ = trainer.compute_reference_log_probs(trainer.data_collator(rows[: spec["size"]]))
        trainer.train()
    if orpo:
        chosen = trainer.metrics[0].other_metrics["logps/chosen"]
    seconds, cpu, compiled = np.subtract(trainer.ended, trainer.began).T.tolist()
    measured = {
        "chosen_logps": float(np.mean(chosen)),
        "losses": [float(metrics.loss) for metrics in trainer.metrics],
        "seconds": seconds,
        "cpu_seconds": cpu,
        "cold": [count > 0 for count in compiled],
        "versions": {"easydel": version("easydel"), "jax": jax.__version__},
        **device_figures(),
    }
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
