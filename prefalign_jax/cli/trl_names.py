"""What TRL, PEFT and Hugging Face's trainer call an option, and what is written here instead."""

from __future__ import annotations

import re

# The option -> a field of the config ('epochs', or with its value: 'lora.dora=True'), or what to do, as a sentence.
TRL_NAMES: dict[str, str] = {
    # The model
    "model_name_or_path": "model.path",
    "model_name": "model.path",
    "model_init_kwargs": "leave it out; the fields of config.model say how a model is loaded",
    "model_revision": "download that revision and write its directory, --config.model.path=DIR",
    "tokenizer_name_or_path": "leave it out; the tokenizer is the one in model.path",
    "tokenizer_name": "leave it out; the tokenizer is the one in model.path",
    "chat_template_path": "data.chat_template",
    "trust_remote_code": "leave it out; code from a model's repository is never run",
    "dtype": "write --config.dtype=bfloat16 for the computation, --config.model.param_dtype=bfloat16 for the weights",
    "torch_dtype": "model.param_dtype",
    "bf16": "dtype=bfloat16",
    "fp16": "write --config.dtype=bfloat16; float16 overflows and is not offered",
    "tf32": "matmul_precision=default",
    "attn_implementation": "write --config.model.attention=cudnn, or leave it out for tiles, which needs no kernel",
    "router_aux_loss_coef": "model.router_weight",
    "load_in_4bit": "model.quantize=nf4",
    "load_in_8bit": "model.quantize=int8",
    "bnb_4bit_quant_type": "model.quantize",
    "bnb_4bit_compute_dtype": "dtype",
    # Adapters
    "use_peft": "lora.rank=16",
    "peft_config": "lora.rank=16",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "write a regex over our names, --config.lora.targets='layers/attention/[qkvo]'",
    "lora_target_parameters": "write a regex over our names, --config.lora.targets='layers/attention/[qkvo]'",
    "lora_modules_to_save": "leave it out; only a reward model's score is trained in full beside its adapters",
    "lora_task_type": "leave it out; the loss says what is trained",
    "use_rslora": "lora.rank_stabilised=True",
    "use_dora": "lora.dora=True",
    # The data
    "dataset_name": "data.path",
    "dataset": "data.path",
    "train_file": "data.path",
    "validation_file": "data.eval_path",
    "dataset_config": "write it after a colon, --config.data.path=NAME:SUBSET",
    "dataset_train_split": "data.split",
    "dataset_test_split": "data.eval_split",
    "dataset_mixer": "write --config.data.mix, see docs/data.md",
    "datasets": "write --config.data.mix, see docs/data.md",
    "max_train_samples": "data.limit",
    "max_eval_samples": "data.eval_limit",
    "max_length": "max_length",
    "max_seq_length": "max_length",
    "max_prompt_length": "write --config.max_length, for prompt and response together, and --config.too_long",
    "max_completion_length": "write --config.max_length, for prompt and response together",
    "max_target_length": "write --config.max_length, for prompt and response together",
    "truncation_mode": "write --config.too_long=truncate_prompt (keep_end) or truncate_response (keep_start)",
    "pad_to_multiple_of": "leave it out; batches are packed, and data.row_length can fix the length of a row",
    "packing": "leave it out; batches are always packed",
    "padding_free": "leave it out; batches are always packed",
    # The length of a run
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "max_steps": "steps",
    "per_device_train_batch_size": "write --config.batch_size, the pairs of an update over all devices and micro-steps",
    "per_device_eval_batch_size": "leave it out; an evaluation takes batch_size / micro_steps pairs at a time",
    "gradient_accumulation_steps": "write --config.micro_steps, the parts that batch_size is computed in",
    "auto_find_batch_size": "leave it out; prefalign plan says what a step takes",
    "batch_size": "batch_size",
    # The optimizer
    "learning_rate": "learning_rate",
    "lr": "learning_rate",
    "lr_scheduler_type": "schedule",
    "lr_scheduler": "schedule",
    "lr_scheduler_kwargs": "leave it out; the schedules constant, linear, cosine and inverse_sqrt have no options",
    "warmup_steps": "warmup_steps",
    "warmup_ratio": "write --config.warmup_epochs: the ratio times the epochs; or warmup_steps, warmup_examples",
    "optim": "write --config.optimizer.name=adamw, rmsprop or sgd",
    "adam_beta1": "optimizer.b1",
    "adam_beta2": "optimizer.b2",
    "adam_epsilon": "optimizer.eps",
    "weight_decay": "optimizer.weight_decay",
    "max_grad_norm": "grad_clip",
    "seed": "seed",
    "data_seed": "seed",
    "disable_dropout": "leave it out; nothing is dropped unless --config.model.dropout is set",
    # Memory and devices
    "gradient_checkpointing": "model.remat=full",
    "activation_checkpointing": "model.remat=full",
    "gradient_checkpointing_kwargs": "write --config.model.remat=full or dots",
    "activation_checkpointing_kwargs": "write --config.model.remat=full or dots",
    "activation_offloading": "write --config.model.remat=full; nothing is moved to the host",
    "use_liger_kernel": "leave it out; logits are made in chunks, see --config.vocabulary_chunk",
    "torch_compile": "leave it out; every step is compiled",
    "fsdp": "write --config.mesh.data=1 --config.mesh.fsdp=-1",
    "fsdp_config": "write --config.mesh.data=1 --config.mesh.fsdp=-1",
    "deepspeed": "write --config.mesh.data=1 --config.mesh.fsdp=-1, which shards as ZeRO 3 does",
    "accelerator_config": "leave it out; config.mesh says how devices are used",
    "parallelism_config": "leave it out; config.mesh says how devices are used",
    "config_file": "leave it out; config.mesh says how devices are used",
    "num_processes": "leave it out; one process uses all devices it sees, and --processes is for several hosts",
    "local_rank": "leave it out; --process is for several hosts, and launchers are asked",
    "use_cpu": "set JAX_PLATFORMS=cpu in the environment",
    # What a run writes
    "output_dir": "write --workdir=DIR",
    "logging_dir": "write --workdir=DIR; TensorBoard's files lie in it",
    "overwrite_output_dir": "name another --workdir, or delete that one",
    "run_name": "write --workdir=runs/NAME, which names the run",
    "project": "write --workdir=PROJECT/NAME, which names the run",
    "logging_steps": "log_steps",
    "logging_strategy": "log_steps",
    "logging_first_step": "leave it out; the first step is always logged",
    "report_to": "leave it out; metrics.jsonl is always written, and --config.tensorboard=True adds event files",
    "disable_tqdm": "leave it out; a file gets no progress bar",
    "eval_strategy": "write --config.eval_steps=N; without it the start and the end are evaluated",
    "evaluation_strategy": "write --config.eval_steps=N; without it the start and the end are evaluated",
    "do_eval": "write --config.data.eval_path or --config.data.eval_fraction",
    "eval_steps": "eval_steps",
    "eval_on_start": "leave it out; a run is evaluated before its first step",
    "save_strategy": "write --config.save_steps=N; without it the end is saved",
    "save_steps": "save_steps",
    "save_total_limit": "checkpoint.keep",
    "load_best_model_at_end": "write --config.checkpoint.best_metric=eval/loss, which keeps the best checkpoint too",
    "metric_for_best_model": "checkpoint.best_metric",
    "greater_is_better": "checkpoint.best_mode=max",
    "resume_from_checkpoint": "leave it out; the same --workdir goes on from its last checkpoint",
    "push_to_hub": "export.push_to=NAME/MODEL",
    "hub_model_id": "export.push_to",
    "hub_token": "set HF_TOKEN in the environment",
    "hub_private_repo": "leave it out; what --config.export.push_to makes is private",
    "generate_during_eval": "samples.prompts=FILE",
    # The reference
    "ref_model": "reference.path",
    "ref_model_name_or_path": "reference.path",
    "precompute_ref_log_probs": "reference.kind=cached",
    "precompute_ref_batch_size": "leave it out; a cached reference takes batch_size / micro_steps pairs at a time",
    "reference_free": "loss.reference_free=True",
    "sync_ref_model": "reference.kind=moving",
    "ref_model_mixup_alpha": "reference.mixup",
    "ref_model_sync_steps": "reference.every",
    # The loss
    "beta": "write --config.loss.beta; ORPO's is --config.loss.lam, IPO's --config.loss.tau",
    "loss_type": "loss.name",
    "loss_weights": "write a weighted sum, --config.loss.name='0.8*dpo+0.2*sft'",
    "label_smoothing": "loss.label_smoothing",
    "label_smoothing_factor": "loss.label_smoothing",
    "rpo_alpha": "write --config.loss.name=rpo --config.loss.alpha=1.0",
    "ld_alpha": "loss.ld_alpha",
    "f_divergence_type": "loss.divergence",
    "f_alpha_divergence_coef": "loss.divergence_alpha",
    "use_weighting": "loss.weighting=wpo_unclipped",
    "discopop_tau": "loss.temperature",
    "desirable_weight": "loss.desirable_weight",
    "undesirable_weight": "loss.undesirable_weight",
    "cpo_alpha": "loss.alpha",
    "simpo_gamma": "loss.gamma",
}
# TRL's loss_type -> what --config.loss.name is to be, with the options that give TRL's numbers.
LOSS_TYPES: dict[str, str] = {
    "sigmoid": "dpo",
    "sigmoid_norm": "ln_dpo",
    "robust": "robust_dpo",
    "ipo": "ipo --config.loss.per_token=True",
    "exo_pair": "exo",
    "nca_pair": "nca",
    "bco_pair": "bco --config.loss.shift=none",
    "sppo_hard": "sppo",
    "aot_pair": "aot_unpaired",
}
# Options of Hugging Face's trainer whose whole family has nothing to do here.
FAMILIES: dict[str, str] = {
    "dataloader_": "leave it out; batches are made while the step before runs",
    "dataset_": "leave it out; data are tokenized once and kept in a cache",
    "ddp_": "leave it out; config.mesh says how devices are used",
    "hub_": "leave it out; --config.export.push_to=NAME/MODEL is all there is to say",
    "include_": "leave it out; metrics.jsonl has it all",
    "log_level": "leave it out; a run says little, and metrics.jsonl has all",
    "log_on_": "leave it out; the first process alone writes",
    "logging_": "leave it out; metrics.jsonl has every logged step",
    "torch_": "leave it out; every step is compiled by XLA",
    "bnb_": "leave it out; --config.model.quantize says all of it",
    "use_bnb_": "leave it out; --config.model.quantize says all of it",
    "trackio_": "leave it out; metrics.jsonl and TensorBoard's files are what a run writes",
}


def instead(given: str, value: str = "") -> str:
    """What to write in place of an option of another trainer, '' for a name that is none of theirs.

    Args:
      given: the option's name, with dashes or underscores.
      value: what it was set to.

    Example:
      >>> instead("num-train-epochs", "3")
      'write --config.epochs=3'
    """
    name = given.replace("-", "_")
    text = TRL_NAMES.get(name) or next((text for start, text in FAMILIES.items() if name.startswith(start)), "")
    if name == "loss_type":
        value = LOSS_TYPES.get(value, value)
    if not re.fullmatch(r"[\w.]+(=\S+)?", text):
        return text
    return f"write --config.{text}" if "=" in text else f"write --config.{text}={value or 'VALUE'}"
