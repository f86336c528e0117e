"""One side of `benchmark.py train`: TRL's DPOTrainer or ORPOTrainer. Reads a specification, prints JSON.

Runs in TRL's environment, without this package. Token ids are given to TRL as words of a tokenizer that knows no other.
"""

import json
import resource
import sys
import tempfile
import time

import datasets
import tokenizers
import torch
import transformers
import trl


def tokenizer_of(vocabulary: int, eos: int) -> transformers.PreTrainedTokenizerFast:
    """A word for every id; text is ids with spaces between."""
    words = {("</s>" if i == eos else f"w{i}"): i for i in range(vocabulary)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


class Watch(transformers.TrainerCallback):
    """Times of the steps, and their losses."""

    def __init__(self):
        self.seconds, self.cpu, self.losses, self.chosen = [], [], [], []

    def on_step_begin(self, args, state, control, **kwargs):
        """Starts the clocks."""
        self.began = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        """Reads them."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began[0])
        self.cpu.append(time.process_time() - self.began[1])

    def on_log(self, args, state, control, logs=None, **kwargs):
        """The loss that TRL logs."""
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.chosen.append(float(logs["logps/chosen"]))


def main() -> None:
    """Trains a few steps."""
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    with open(spec["pairs"], encoding="utf-8") as file:
        sides = json.load(file)
    used, eos = spec["steps"] * spec["size"], spec["eos"]
    tokenizer = tokenizer_of(spec["vocabulary"], eos)
    rows = [
        {
            # A word's text has a space before it, so that a prompt and its responses are one text.
            "prompt": " ".join(f"w{i}" for i in prompt),
            "chosen": "".join(f" w{i}" for i in chosen[:-1]) + " ",  # TRL adds the EOS
            "rejected": "".join(f" w{i}" for i in rejected[:-1]) + " ",
        }
        for prompt, chosen, rejected in zip(*(sides[name][:used] for name in sides), strict=True)
    ]
    orpo = spec["loss"] == "orpo"
    if orpo:
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer
    make_config, make_trainer = (ORPOConfig, ORPOTrainer) if orpo else (trl.DPOConfig, trl.DPOTrainer)
    watch = Watch()
    gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as scratch:
        options = dict(
            output_dir=scratch,
            per_device_train_batch_size=spec["size"],
            max_steps=spec["steps"],
            learning_rate=spec["learning_rate"],
            lr_scheduler_type="constant",
            optim="adamw_torch_fused" if gpu else "adamw_torch",
            max_grad_norm=0.0,  # no clipping on either side
            beta=0.1,
            max_length=spec["max_length"],
            bf16=spec["dtype"] == "bfloat16",
            gradient_checkpointing=spec["remat"] != "none",
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            dataloader_num_workers=0,
            use_cpu=not gpu,
            disable_tqdm=True,
        )
        if orpo:
            options["disable_dropout"] = True
        if spec["head"] == "fused":
            options["use_liger_kernel"] = True  # of layers: DPOTrainer fuses the head by itself, and refuses Liger's
        dtype = getattr(torch, spec["param_dtype"])
        model = transformers.AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype)
        more = {}
        if spec["lora"]:
            import peft

            more["peft_config"] = peft.LoraConfig(
                r=spec["lora"], lora_alpha=spec["lora"], target_modules="all-linear", task_type="CAUSAL_LM"
            )

        class InOrder(make_trainer):
            """Takes the pairs as they come."""

            def _get_train_sampler(self, *args, **kwargs):
                return torch.utils.data.SequentialSampler(self.train_dataset)

        trainer = InOrder(
            model=model,
            args=make_config(**options),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[watch],
            **more,
        )
        trainer.train()
    peak = torch.cuda.max_memory_allocated() if gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    measured = {
        "losses": watch.losses[: spec["steps"]],
        "chosen_logps": watch.chosen[0],
        "seconds": watch.seconds,
        "cpu_seconds": watch.cpu,
        "peak_bytes": peak,
        "versions": {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "device": torch.cuda.get_device_name() if gpu else "cpu",
    }
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
