"""What a user who comes from TRL types first, and the one line that says what it is called here."""

import dataclasses
import re

import pytest

from prefalign_jax import commands
from prefalign_jax.cli.trl_names import FAMILIES, LOSS_TYPES, TRL_NAMES, instead
from prefalign_jax.config import defaults
from prefalign_jax.losses import LOSSES
from prefalign_jax.options import flatten

pytestmark = pytest.mark.usefixtures("launch_leaves_no_trace")
DPO = "--config=dpo:model=m,data=d"


def said(capsys, words):
    assert commands.main(words) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("error: ") and len(line) < 250
    return line


# An option of TRL's, with its value -> what the line tells to write.
OPTIONS = {
    "--model_name_or_path=Qwen/Qwen3-0.6B": "write --config.model.path=Qwen/Qwen3-0.6B",
    "--dataset_name trl-lib/ultrafeedback_binarized": "write --config.data.path=trl-lib/ultrafeedback_binarized",
    "--dataset_train_split=train_prefs": "write --config.data.split=train_prefs",
    "--dataset_config=harmless-base": "--config.data.path=NAME:SUBSET",
    "--output_dir runs/first": "write --workdir=DIR",
    "--learning_rate 5.0e-7": "write --config.learning_rate=5.0e-7",
    "--num_train_epochs 1": "write --config.epochs=1",
    "--max_steps=100": "write --config.steps=100",
    "--per_device_train_batch_size 2": "write --config.batch_size",
    "--gradient_accumulation_steps 8": "write --config.micro_steps",
    "--per_device_eval_batch_size=8": "leave it out",
    "--gradient_checkpointing": "write --config.model.remat=full",
    "--beta=0.05": "write --config.loss.beta; ORPO's is --config.loss.lam",
    "--loss_type=sigmoid": "write --config.loss.name=dpo",
    "--loss_type=ipo": "write --config.loss.name=ipo --config.loss.per_token=True",
    "--loss_type=hinge": "write --config.loss.name=hinge",
    "--label_smoothing=0.1": "write --config.loss.label_smoothing=0.1",
    "--rpo_alpha=1.0": "--config.loss.name=rpo --config.loss.alpha=1.0",
    "--ld_alpha=0.5": "write --config.loss.ld_alpha=0.5",
    "--f_divergence_type=js_divergence": "write --config.loss.divergence=js_divergence",
    "--use_weighting": "write --config.loss.weighting=wpo_unclipped",
    "--bf16": "write --config.dtype=bfloat16",
    "--bf16=True": "write --config.dtype=bfloat16",
    "--fp16": "write --config.dtype=bfloat16; float16 overflows",
    "--torch_dtype=bfloat16": "write --config.model.param_dtype=bfloat16",
    "--attn_implementation=flash_attention_2": "--config.model.attention=cudnn",
    "--use_peft": "write --config.lora.rank=16",
    "--lora_r 32": "write --config.lora.rank=32",
    "--lora_alpha 16": "write --config.lora.alpha=16",
    "--lora_dropout=0.05": "write --config.lora.dropout=0.05",
    "--lora_target_modules q_proj v_proj": "--config.lora.targets='layers/attention/[qkvo]'",
    "--load_in_4bit": "write --config.model.quantize=nf4",
    "--load_in_8bit": "write --config.model.quantize=int8",
    "--warmup_ratio=0.1": "write --config.warmup_ratio=0.1",
    "--warmup_steps=100": "write --config.warmup_steps=100",
    "--lr_scheduler_type cosine": "write --config.schedule=cosine",
    "--optim=adamw_torch": "write --config.optimizer.name=adamw",
    "--weight_decay=0.01": "write --config.optimizer.weight_decay=0.01",
    "--adam_beta2=0.95": "write --config.optimizer.b2=0.95",
    "--max_grad_norm=0.3": "write --config.grad_clip=0.3",
    "--max_length=1024": "write --config.max_length=1024",
    "--max_prompt_length=512": "write --config.max_length, for prompt and response together",
    "--max_completion_length=512": "write --config.max_length, for prompt and response together",
    "--truncation_mode=keep_end": "write --config.too_long=truncate_prompt",
    "--packing": "batches are always packed",
    "--eval_accumulation_steps=4": "leave it out",
    "--eval_strategy=steps": "write --config.eval_steps=N",
    "--eval_steps 50": "write --config.eval_steps=50",
    "--save_strategy=epoch": "write --config.save_steps=N",
    "--save_steps=500": "write --config.save_steps=500",
    "--save_total_limit=2": "write --config.checkpoint.keep=2",
    "--load_best_model_at_end": "write --config.checkpoint.best_metric=eval/loss",
    "--logging_steps=25": "write --config.log_steps=25",
    "--report_to=wandb": "write --config.log_to=wandb",
    "--run_name=first": "write --workdir=runs/NAME",
    "--resume_from_checkpoint=True": "the same --workdir goes on",
    "--push_to_hub": "write --config.export.push_to=NAME/MODEL",
    "--hub_model_id=me/model": "write --config.export.push_to=me/model",
    "--ref_model=base": "write --config.reference.path=base",
    "--precompute_ref_log_probs": "write --config.reference.kind=cached",
    "--sync_ref_model": "write --config.reference.kind=moving",
    "--ref_model_mixup_alpha=0.6": "write --config.reference.mixup=0.6",
    "--deepspeed=ds_z3.json": "write --config.mesh.fsdp=-1",
    "--fsdp=full_shard": "write --config.mesh.fsdp=-1",
    "--seed=42": "write --config.seed=42",
    "--dataset_num_proc=12": "leave it out",
    "--dataloader_num_workers=4": "leave it out",
    "--ddp_timeout=1800": "leave it out",
    "--trust_remote_code": "never run",
    "--learning-rate=1e-6": "write --config.learning_rate=1e-6",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_of_trl_is_answered(option, capsys):
    assert OPTIONS[option] in said(capsys, ["train", DPO, *option.split()])


@pytest.mark.parametrize("option", [option for option in OPTIONS if " " not in option])
def test_so_it_is_as_a_field_of_the_config(option, capsys):
    name = re.match(r"--([\w-]+)", option)[1].replace("-", "_")
    if name in defaults():
        pytest.skip("it is one")
    line = said(capsys, ["train", DPO, f"--config.{name}{option[2 + len(name) :]}"])
    assert f"no field {name!r}" in line and OPTIONS[option] in line


# Everything else that is nearly right: the words -> what the line says.
COMMAND_LINES = {
    "dpo --model_name_or_path=m": "write prefalign train --config=dpo",
    "orpo": "write prefalign train --config=orpo",
    "train dpo": "an experiment is named by --config=dpo",
    "train --config=dpo model=m data=d": "follow its colon, --config=NAME:model=m",
    "train --config=dpo,model=m,data=d": "a colon follows the experiment, --config=dpo:model=m,data=d",
    "train --config=experiments/dpo.py,model=m": "a colon follows the experiment, --config=experiments/dpo.py:model=m",
    "train --config=dpo:model=m:data=d": "separated by commas, --config=dpo:model=m,data=d",
    "train --config=dpo:model=m,dataset=d": "config argument 'dataset' is unknown; did you mean 'data'?",
    "train --config=dpo:model=m,learning_rate=1e-6": "are set by --config.FIELD=VALUE",
    "train --config=dpo:loss=sigmoid,model=m,data=d": "'sigmoid' is unknown",
    "train --config=dpoo:model=m": "did you mean 'dpo'?",
    "train --config=zephyr_7b_dpo": "did you mean --config=handbook/zephyr_7b_dpo?",
    "train --config=dpo.py:model=m": "did you mean --config=dpo?",
    "train --config=recipes/zephyr-7b-beta/dpo/config_full.yaml": "an experiment is a Python file",
    "train --config=mine": "did you mean mine.py?",
    "train --config=mine.py": "it has no get_config()",
    "train --config=broken.py": "broken.py, line 1: SyntaxError",
    "train --config=none.py": "get_config() returned NoneType",
    "train --config=plain.py:model=m": "its get_config takes no argument",
    "train --config=argument.py": "its get_config needs an argument; write --config=argument.py:ARG",
    "train --config=slip.py": "slip.py, line 4: the config has no field 'epoch'; did you mean 'epochs'?",
    "train": "write --config=quickstart",
    f"train {DPO} --workdri=w": "did you mean '--workdir'?",
    f"train {DPO} --batch_size=8": "write --config.batch_size=8",
    f"train {DPO} --lora.rank=8": "write --config.lora.rank=8",
    f"train {DPO} --epoch=3": "write --config.epochs=3",
    f"train {DPO} --config.optim.lr=3": "no field 'optim.lr'; write --config.learning_rate=3",
    f"train {DPO} --config.loss=ipo": "did you mean --config.loss.name=ipo?",
    f"train {DPO} --config.epochs=three": "--config.epochs='three' is of the wrong type; write a number",
    f"train {DPO} --config.steps": "--config.steps has no value",
    f"train {DPO} --config.seed.data=3": "config.seed.data: seed is a field",
    f"train {DPO} --noconfig.seed": "is for truth values",
    "generate --model_name_or_path=m": "did you mean '--model'?",
    "evaluate --model=m --dataset_name=d": "--dataset_name: no such option",
    "sweep --config=dpo:model=m,data=d --output_dir=w": "write --workdir=DIR",
}
FILES = {
    "mine.py": "",
    "broken.py": "def get_config(:\n",
    "none.py": "def get_config(): pass\n",
    "plain.py": "from prefalign_jax import config\nget_config = lambda: config.defaults()\n",
    "argument.py": "from prefalign_jax import config\ndef get_config(arg): return config.defaults()\n",
    "slip.py": "from prefalign_jax import config\ndef get_config():\n    c = config.defaults()\n    c.epoch = 1\n",
}


@pytest.mark.parametrize("words", COMMAND_LINES)
def test_what_is_nearly_right_is_answered(words, capsys, tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    assert COMMAND_LINES[words] in said(capsys, words.split())


# The table


FIELDS = flatten(defaults().to_dict())


@pytest.mark.parametrize("name", [*TRL_NAMES, *LOSS_TYPES])
def test_what_the_table_tells_to_write_exists(name):
    text = instead(name, "1") if name in TRL_NAMES else f"--config.loss.name={LOSS_TYPES[name]}"
    assert text, name
    for field in re.findall(r"--config\.([\w.]*\w)", text):
        assert field in FIELDS or f"{field}.name" in FIELDS, field
    if name in LOSS_TYPES:
        assert LOSS_TYPES[name].split()[0] in LOSSES


def test_no_name_of_ours_is_taken_for_one_of_theirs():
    ours = {field for field in FIELDS if "." not in field}
    assert all(f"--config.{name}" in instead(name, "1") for name in ours & TRL_NAMES.keys())
    assert not [field for field in ours - TRL_NAMES.keys() if any(field.startswith(start) for start in FAMILIES)]


@pytest.mark.parity
def test_every_field_of_trls_configs_is_answered():
    trl = pytest.importorskip("trl")
    orpo = pytest.importorskip("trl.experimental.orpo").ORPOConfig
    for config in (trl.DPOConfig, orpo, trl.SFTConfig, trl.RewardConfig, trl.ModelConfig, trl.ScriptArguments):
        unknown = [field.name for field in dataclasses.fields(config) if not instead(field.name)]
        assert unknown == [], config
