"""What a run answers to wrong data, models, options and directories: one line, before any step is taken.

tests/test_cli.py has what the command line itself refuses.
"""

import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prefalign_jax import commands

ROOT = pathlib.Path(__file__).parents[1]
MODEL = ROOT / "tests/goldens/trl"
PARTS = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
UP = "model.layers.1.mlp.up_proj.weight"
PAIRS = [{key: row[key] for key in ("prompt", "chosen", "rejected")}
         for row in map(json.loads, (MODEL / "pairs.jsonl").read_text().splitlines()[:8])]  # fmt: skip
CHAT = [
    {"prompt": [{"role": "user", "content": "a"}]}
    | {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
]
pytestmark = pytest.mark.usefixtures("launch_leaves_no_trace")


@pytest.fixture
def fails(capsys):
    """fails(overrides, experiment=, model=, data=) -> the one line of `prefalign train` with these."""

    def run(overrides="", experiment="dpo", model=MODEL, data=MODEL / "pairs.jsonl"):
        small = ["batch_size=8", "max_length=256", "steps=1"]
        argv = ["train", f"--config={experiment}:model={model},data={data}", "--workdir=w"]
        argv += [f"--config.{text}" for text in [*small, *overrides.split()]]
        status = commands.main(argv)
        out, err = capsys.readouterr()
        assert (status, out) == (2, "")
        *notes, last = err.splitlines()
        assert last.startswith("error: ")
        assert [line for line in notes if "; dropped " not in line] == []
        assert "Traceback" not in err
        assert len(last) < 400
        assert not pathlib.Path("w/checkpoints").exists()
        return last

    return run


# Options


OPTIONS = [  # what is written, in which experiment, what the line must say
    ("loss.name=dppo", "dpo", "loss.name='dppo' mean 'dpo'"),
    ("loss.lam=3", "dpo", "'dpo' 'lam' beta"),
    ("loss.beta=3", "orpo", "'orpo' 'beta' lam"),
    ("loss.beta=-1", "dpo", "'dpo' beta=-1.0 positive"),
    ("loss.divergence_alpha=0.3", "dpo", "divergence_alpha divergence=alpha 'reverse_kl'"),
    ("loss.name=0.8*dpo+", "dpo", "loss.name='0.8*dpo+' read WEIGHT*NAME"),
    ("loss.name=dpo(beta=x)", "dpo", "beta='x' float"),
    ("loss.name=dpo+kto", "dpo", "'dpo+kto' kinds"),
    ("loss.name=tdpo1 reference.kind=cached", "dpo", "'tdpo1' reference.kind copy moving"),
    ("loss.extra_eos=true too_long=truncate_response", "orpo", "'orpo' end too_long=truncate_response"),
    ("loss.extra_eos=true data.keep_end=true", "orpo", "'orpo' data.keep_end=False"),
    ("loss.name=bradley_terry reference.kind=none too_long=truncate_response", "dpo", "too_long=truncate_response"),
    ("loss.name=odpo", "dpo", "pairs.jsonl row 1 margin score_chosen"),
    ("reference.kind=moving reference.every=9", "dpo", "reference.every=9 1 steps"),
    ("reference.kind=moving reference.mixup=1.5", "dpo", "reference.mixup=1.5 (0, 1]"),
    ("reference.mixup=0.5", "dpo", "reference.mixup reference.kind=moving"),
    ("lora.alpha=3", "dpo", "lora.alpha lora.rank"),
    ("lora.rank=0", "dpo", "lora.rank=0 positive"),
    ("data.clean=role_marker", "dpo", "data.clean='role_marker' mean 'role_markers'"),
    ("data.cleaning.lengths.least_words=3", "dpo", "data.cleaning.lengths.least_words data.clean 'lengths'"),
    ("data.clean=ties", "sft", "'ties' pairs supervised"),
    ("data.flip_labels=1", "dpo", "data.flip_labels=1.0 [0, 1)"),
    ("data.flip_labels=0.1", "sft", "data.flip_labels 'sft' pairs"),
    ("lora.path=x lora.alpha=3", "dpo", "lora.alpha lora.path unset"),
    ("lora.path=nowhere", "dpo", "nowhere adapter_config.json"),
    ("lora.rank=2 lora.dropout=1", "dpo", "lora.dropout=1.0 [0, 1)"),
    ("lora.dropout=0.1", "dpo", "lora.dropout lora.rank"),
    ("model.dropout=-0.1", "dpo", "model.dropout=-0.1 [0, 1)"),
    ("export.push_to=model", "dpo", "export.push_to='model' NAME/MODEL"),
    ("lora.rank=2 lora.targets=attn", "dpo", "lora.targets='attn' layers/attention/q"),
    ("lora.rank=2 reference.kind=moving", "dpo", "reference.kind='moving' lora.rank base"),
    ("model.quantize=nf4", "dpo", "model.quantize='nf4' lora.rank"),
    ("model.quantize=int4 lora.rank=2", "dpo", "model.quantize='int4' int8, nf4"),
    ("model.router_weight=0.1", "dpo", "model.router_weight=0.1 mixtures"),
    ("loss.label_smoothing=0.7", "dpo", "label_smoothing=0.7 [0, 0.5)"),
    ("reference.kind=none", "dpo", "'dpo' reference.kind copy cached"),
    ("reference.kind=copy", "orpo", "'orpo' reference.kind=none"),
    ("reference.kind=cache", "dpo", "reference.kind='cache' mean 'cached'"),
    ("reference.cache_dir=c", "dpo", "reference.cache_dir reference.kind=cached"),
    ("loss.name=orpo", "dpo", "'orpo' reference.kind=none"),
    ("micro_steps=3", "dpo", "batch_size=8 micro_steps=3"),
    ("batch_size=0", "dpo", "batch_size=0 positive"),
    ("steps=-1", "dpo", "steps=-1 positive"),
    ("mesh.data=3", "dpo", "mesh 'data': 3 device(s)"),
    ("mesh.data=-1 mesh.fsdp=-1", "dpo", "mesh one may be -1"),
    ("data.row_length=8", "dpo", "data.row_length=8 longest tokens"),
    ("max_length=1", "dpo", "max_length 2 found 1"),
    ("max_length=4", "dpo", "pairs.jsonl: no pairs left 64 too long max_length is 4"),
    ("warmup_steps=10", "dpo", "warmup_steps=10 1 steps at most"),
    ("warmup_epochs=3", "dpo", "warmup_ 1 steps at most"),
    ("learning_rate=-1", "dpo", "learning_rate=-1.0 >= 0"),
    ("learning_rate=nan", "dpo", "learning_rate=nan >= 0"),
    ("steps=0 epochs=1e308", "dpo", "epochs=1e+308 out of range"),
    ("warmup_epochs=1e308", "dpo", "warmup_epochs=1e+308 out of range"),
    (f"data.limit={2**63}", "dpo", f"data.limit={2**63} out of range"),
    (f"steps={2**63}", "dpo", f"steps={2**63} out of range"),
    (f"steps=0 examples={2**31}", "dpo", f"examples={2**31} out of range"),
    ("loss={}", "dpo", "config.loss group of fields"),
    ("schedule=cosin", "dpo", "schedule='cosin' mean 'cosine'"),
    ("optimizer.name=adam", "dpo", "optimizer.name='adam' mean 'adamw'"),
    ("optimizer.momentum=0.9", "dpo", "'adamw' 'momentum' weight_decay"),
    ("optimizer.b1=1.5", "dpo", "'adamw' b1=1.5 [0, 1)"),
    ("dtype=float16", "dpo", "dtype='float16' mean 'bfloat16'"),
    ("model.param_dtype=bf16", "dpo", "model.param_dtype='bf16' float32, bfloat16"),
    ("export.dtype=int8", "dpo", "export.dtype='int8' float32, bfloat16"),
    ("model.remat=dot", "dpo", "remat='dot' none, dots, full"),
    ("model.attention=cudnn", "dpo", "model.attention='cudnn' needs an NVIDIA GPU cpu 'tiles'"),
    ("model.attention=splash", "dpo", "model.attention='splash' needs a TPU cpu 'tiles'"),
    ("model.attention=flash", "dpo", "model.attention='flash' tiles, cudnn, splash"),
    ("data.layout=trees", "dpo", "data.layout='trees' mean 'tree'"),
    ("too_long=cut", "dpo", "too_long='cut' truncate_prompt"),
    ("data.chat_template=chatlm", "dpo", "chat_template chatml .jinja 'chatlm'"),
    ("data.eval_fraction=1", "dpo", "data.eval_fraction=1.0 [0, 1)"),
    ("data.eval_fraction=0.1 data.eval_path=x", "dpo", "data.eval_path data.eval_fraction set one"),
    ("data.eval_path=absent.jsonl", "dpo", "absent.jsonl no such file"),
    ('data.mix=({"path":"x"},)', "dpo", "data.path data.mix both set"),
    ("data.format=hsp", "dpo", "data.format='hsp' mean 'shp'"),
    ("data.leaks=drop", "dpo", "data.leaks='drop' held-out"),
    ("checkpoint.best_metric=eval/loss", "dpo", "checkpoint.best_metric data.eval_path data.eval_fraction"),
    ("checkpoint.best_mode=mim", "dpo", "checkpoint.best_mode='mim' mean 'min'"),
    ("early_stopping.metric=eval/loss eval_steps=1", "dpo", "early_stopping.metric data.eval_path data.eval_fraction"),
    ("log_to=wandbee", "dpo", "log_to='wandbee' mean 'wandb' trackio, mlflow"),
    ("reference.path=absent", "dpo", "'absent' directory hub"),
]


@pytest.mark.parametrize(("overrides", "experiment", "words"), OPTIONS, ids=[f"{o[1]}-{o[0]}" for o in OPTIONS])
def test_a_wrong_option_is_one_line(fails, overrides, experiment, words):
    said = fails(overrides, experiment)
    for word in words.split():
        assert word in said


# Data


DATA = {  # a file's name -> (its rows, what the line must say besides the name)
    "no_json.jsonl": ([*PAIRS[:3], '{"prompt": "a", "chosen": '], "row 4: JSON object"),
    "type.jsonl": ([*PAIRS[:3], PAIRS[3] | {"chosen": 7}], "row 4: 'chosen': string messages 7"),
    "missing_field.jsonl": ([*PAIRS[:3], {"prompt": "a", "chosen": "b"}], "row 4: found columns=rejected=FIELD"),
    "prompts.jsonl": ([{"prompt": "a"}], "row 1: chosen, rejected, found prompt chosen=FIELD,rejected=FIELD"),
    "list.jsonl": (["[1, 2]"], "row 1: JSON object list"),
    "role.jsonl": ([CHAT[0] | {"prompt": [{"role": "bot", "content": "a"}]}], "row 1: 'prompt[0].role': user 'bot'"),
    "weight.jsonl": ([PAIRS[0] | {"weight": -1}], "row 1: 'weight': positive -1"),
    "empty.jsonl": ([], "no record is left row"),
    "same.jsonl": ([row | {"rejected": row["chosen"]} for row in PAIRS], "no record is left identical 8"),
    "table.txt": (["prompt,chosen,rejected"], ".jsonl .parquet"),
    "table.csv": (["prompt", "chosen"], "row 1: chosen, rejected, found --config.data.columns=chosen=FIELD"),
    "broken.parquet": (["nothing of the sort"], "row 1: readable Parquet"),
    "broken.jsonl.gz": (["nothing of the sort"], "row 1: readable gzip"),
    "absent.jsonl": (None, "no such file"),
    "twice.jsonl": (
        [PAIRS[0], '{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}'],
        "row 2: 'chosen' twice",
    ),
    "surrogate.jsonl": ([PAIRS[0] | {"chosen": "\ud83d"}], "row 1: 'chosen': Unicode"),
    "nan.jsonl": ([PAIRS[0], PAIRS[1] | {"chosen": float("nan")}], "row 2: 'chosen': string nan"),
    "nulls.jsonl": ([CHAT[0] | {"chosen": [{"role": "assistant", "content": None}]}], "row 1: 'chosen[0].content':"),
    "mixed.jsonl": ([PAIRS[0], CHAT[0] | {"chosen": "a"}], "row 2: 'rejected': string 'chosen'"),
    "cut.json": (["[" + json.dumps(PAIRS[0]) + ","], "row 2: JSON array"),
    "labels.jsonl": ([{"history": "a", "human_ref_A": "b", "human_ref_B": "c", "labels": 3}], "row 1: 'labels': 0, 1"),
}


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("held_out", [False, True], ids=["train", "eval"])
def test_wrong_data_is_one_line_with_its_place(fails, name, held_out):
    rows, words = DATA[name]
    if rows is not None:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        pathlib.Path(name).write_text("".join(line + "\n" for line in lines))
    said = fails(f"data.eval_path={name}") if held_out else fails(data=name)
    assert said.startswith(f"error: {name}")
    for word in words.split():
        assert word in said


# Models


def _tensors(change):
    def apply(directory):
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return apply


def _config(**fields):
    def apply(directory):
        config = json.loads((directory / "config.json").read_text()) | fields
        kept = {key: value for key, value in config.items() if value != "absent"}
        (directory / "config.json").write_text(json.dumps(kept))

    return apply


def _only_pickle(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def _truncated(directory):
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def _without(*names):
    return lambda directory: [(directory / name).unlink() for name in names]


def _broken(name, text='{"a": '):
    return lambda directory: (directory / name).write_text(text)


MODELS = {  # a directory's name -> (what is done to a good one, what the line must say)
    "pickle": (_only_pickle, "pickle pytorch_model.bin safetensors"),
    "no_weights": (_without("model.safetensors"), "no_weights model.safetensors"),
    "no_config": (_without("config.json"), "no_config config.json"),
    "no_tokenizer": (_without("tokenizer.json", "tokenizer_config.json"), "no_tokenizer tokenizer"),
    "broken_tokenizer": (_broken("tokenizer.json"), "broken_tokenizer tokenizer"),
    "broken_config": (_broken("config.json"), "broken_config config.json JSON"),
    "truncated": (_truncated, "truncated/model.safetensors whole"),
    "pointer": (_broken("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), "pointer/model whole"),
    "tensor_missing": (_tensors(lambda t: t.pop(UP)), f"tensor_missing {UP} missing"),
    "tensor_shape": (
        _tensors(lambda t: t.update({UP: np.ascontiguousarray(t[UP][1:])})),
        f"tensor_shape {UP} (127, 64) (128, 64)",
    ),
    "tensor_type": (_tensors(lambda t: t.update({UP: t[UP].astype(np.int8)})), f"tensor_type {UP} I8 BF16"),
    "tensor_unknown": (_tensors(lambda t: t.update(other=t[UP])), "tensor_unknown other llama"),
    "layers": (_config(num_hidden_layers=1), "layers model.layers.1. 1 layers"),
    "wide": (_config(hidden_size=128, head_dim=32), "wide (512, 64) (512, 128)"),
    "family": (_config(model_type="mamba"), "'mamba' supported llama, mistral"),
    "activation": (_config(hidden_act="gelu_new"), "config.json hidden_act='gelu_new' 'silu'"),
    "no_width": (_config(hidden_size="absent"), "config.json hidden_size"),
}


@pytest.fixture
def model():
    """model(name, change) -> a copy of the good model directory, changed."""

    def make(name, change):
        directory = pathlib.Path(name)
        directory.mkdir()
        for part in PARTS:
            shutil.copy(MODEL / part, directory / part)
        change(directory)
        return directory

    return make


@pytest.mark.parametrize("name", MODELS)
def test_a_wrong_model_is_one_line(fails, model, name):
    change, words = MODELS[name]
    said = fails(model=model(name, change))
    for word in words.split():
        assert word in said


@pytest.mark.parametrize("content", ["[" * 5000 + "]" * 5000, "[]", "5", "null", "{", "\0"])
@pytest.mark.parametrize(
    "file", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
)
def test_a_file_of_a_tokenizer_that_is_no_json_object_is_named(fails, model, file, content):
    said = fails(model=model("model", lambda directory: (directory / file).write_text(content)))
    assert f"model/{file}: expected " in said


@pytest.mark.parametrize("path", ["absent", "owner/absent", "/absent/model"])
def test_an_absent_model_is_named(fails, path):
    assert path in fails(model=path)


def test_a_path_that_no_hub_has_is_a_missing_directory(fails):
    assert fails(model="runs/quikstart/sft/export") == "error: model 'runs/quikstart/sft/export': no such directory"


def test_a_run_in_a_models_place_says_where_its_model_is(fails, model):
    run = pathlib.Path("run")
    (run / "export").mkdir(parents=True)
    (run / "export/config.json").write_text("{}")
    for name in ("config.json", "metrics.jsonl"):
        (run / name).write_text("{}")
    assert fails(model=run) == "error: run is a run; name its model, run/export"


def test_messages_without_a_chat_template_say_what_to_set(fails, model):
    pathlib.Path("chat.jsonl").write_text(json.dumps(CHAT[0]) + "\n")
    said = fails(model=model("plain", _without("chat_template.jinja")), data="chat.jsonl")
    for word in ("chat.jsonl, row 1", "data.chat_template", "chatml"):
        assert word in said


def test_a_broken_chat_template_names_the_row(fails, model):
    pathlib.Path("chat.jsonl").write_text(json.dumps(CHAT[0]) + "\n")
    said = fails(model=model("broken", _broken("chat_template.jinja", "{% for m in")), data="chat.jsonl")
    assert "chat.jsonl, row 1: the chat template" in said


def test_a_reference_of_another_shape_is_refused(fails, model):
    def wider(directory):
        _config(intermediate_size=130)(directory)

        def pad(tensors):
            for name, tensor in tensors.items():
                if "mlp" in name:
                    axis = 1 if "down" in name else 0
                    tensors[name] = np.pad(tensor, [(0, 2 if i == axis else 0) for i in (0, 1)])

        _tensors(pad)(directory)

    said = fails(f"reference.path={model('wider', wider)}")
    assert "reference.path='wider'" in said
    assert "model.path" in said
