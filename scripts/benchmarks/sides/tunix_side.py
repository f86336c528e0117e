"""One side of `benchmark.py train`: Tunix's DPOTrainer. Reads a specification, prints JSON.

Runs in Tunix's environment, without this package. Prompts and responses are padded to the longest of the run, in
multiples of 64: other shapes would compile other programs.
"""

import json
import sys
import time
from importlib.metadata import version

import jax
import numpy as np
import optax
from jax_device import device_figures
from tunix.models.llama3 import model as llama3
from tunix.models.llama3 import params
from tunix.sft.dpo import dpo_trainer


def padded(rows: list[list[int]], width: int, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask [rows, width]."""
    ids, mask = np.zeros((2, len(rows), width), np.int32)
    for number, row in enumerate(rows):
        here = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, here], mask[number, here] = row, 1
    return ids, mask


class Trainer(dpo_trainer.DPOTrainer):
    """Keeps losses and times; waits for every step, as the other sides do."""

    def _post_process_train_step(self, aux):
        super()._post_process_train_step(aux)
        self.chosen = [*getattr(self, "chosen", []), float(aux["log_probs/chosen"])]
        self.kept.append((float(self._buffered_train_metrics.losses[-1]), time.perf_counter(), time.process_time()))


def main() -> None:
    """Trains a few steps."""
    spec = json.loads(sys.argv[1])
    with open(f"{spec['model']}/config.json", encoding="utf-8") as file:
        hf = json.load(file)
    remat = llama3.RematConfig.NONE if spec["remat"] == "none" else llama3.RematConfig.BLOCK
    rope = hf.get("rope_theta") or hf["rope_parameters"]["rope_theta"]
    config = llama3.ModelConfig(
        num_layers=hf["num_hidden_layers"],
        vocab_size=hf["vocab_size"],
        embed_dim=hf["hidden_size"],
        hidden_dim=hf["intermediate_size"],
        num_heads=hf["num_attention_heads"],
        head_dim=hf["head_dim"],
        num_kv_heads=hf["num_key_value_heads"],
        norm_eps=hf["rms_norm_eps"],
        rope_theta=rope,
        weight_tying=hf["tie_word_embeddings"],
        remat_config=remat,
    )
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    dtype = jax.numpy.dtype(spec["param_dtype"])
    with open(spec["pairs"], encoding="utf-8") as file:
        sides = json.load(file)
    used = {name: rows[: spec["steps"] * spec["size"]] for name, rows in sides.items()}
    width = {name: -(-max(map(len, rows)) // 64) * 64 for name, rows in used.items()}
    width["chosen"] = width["rejected"] = max(width["chosen"], width["rejected"])
    began = []

    def batches():
        for step in range(spec["steps"]):
            here = slice(step * spec["size"], (step + 1) * spec["size"])
            arrays = {name: padded(rows[here], width[name], name == "prompt") for name, rows in used.items()}
            began.append((time.perf_counter(), time.process_time()))
            yield dpo_trainer.TrainingInput(
                **{
                    f"{name}_{kind}": x
                    for name, two in arrays.items()
                    for kind, x in zip(("ids", "mask"), two, strict=True)
                }
            )

    with mesh:
        policy = params.create_model_from_safe_tensors(spec["model"], config, mesh, dtype)
        reference = params.create_model_from_safe_tensors(spec["model"], config, mesh, dtype)
        trainer = Trainer(
            model=policy,
            ref_model=reference,
            optimizer=optax.adamw(spec["learning_rate"], weight_decay=0.0),
            training_config=dpo_trainer.DPOTrainingConfig(
                eval_every_n_steps=10**9, max_steps=spec["steps"], beta=0.1, pbar_description=None
            ),
        )
        trainer.kept = []
        trainer.train(batches())
    measured = {
        "chosen_logps": trainer.chosen[0],
        "losses": [loss for loss, *_ in trainer.kept],
        "seconds": [end[1] - start[0] for start, end in zip(began, trainer.kept, strict=False)],
        "cpu_seconds": [end[2] - start[1] for start, end in zip(began, trainer.kept, strict=False)],
        "versions": {"google-tunix": version("google-tunix"), "jax": jax.__version__},
        **device_figures(),
    }
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
