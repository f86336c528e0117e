import base64
import copy
import dataclasses
import functools
import http.server
import json
import threading

import huggingface_hub
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from prefalign_jax.config import defaults
from prefalign_jax.data.chat import tokenize_records
from prefalign_jax.data.records import Record
from prefalign_jax.data.trees import Layout
from prefalign_jax.experiment import read
from prefalign_jax.export import (
    export,
    how_to_score,
    model_card,
    padded_apart,
    push,
    without_secrets,
)
from prefalign_jax.models import hf_io
from prefalign_jax.models.decoder import make_decoder
from prefalign_jax.types import Pair, UserError, WriteError
from small import first, logps_of, packed
from test_endings import Template
from test_hf_io import CONFIG, TOKENS, assert_trees_equal, logits, write_directory

CARD = {
    "base_model": "someone/base",
    "datasets": ["someone/pairs"],
    "tags": ["tiny"],
    "license": "apache-2.0",
    "loss": "dpo",
    "formula": "-log sigmoid(beta h)",
    "hyper_parameters": {"beta": 0.1, "over": "prompt|chosen"},
    "data": {"training pairs": 300},
    "metrics": {"rewards/accuracies": 0.71234567, "loss": float("nan")},
    "config": {"seed": 3, "optimizer": {"learning_rate": 5e-7}, "hub": {"hf_token": "hf_abc", "revision": "main"}},
}


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as an upload asks of it; the server's `calls` are what came, and `status` is its mood."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        self.server.calls.append((self.path, self.headers["Authorization"], body))
        site = "https://huggingface.co/someone/tiny"
        answer = {"url": site, "commitUrl": f"{site}/commit/0", "commitOid": "0", "success": True}
        if "preupload" in self.path:
            wish = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{**file, **wish} for file in json.loads(body)["files"]]}
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.calls, server.status = [], 200
        threading.Thread(target=server.serve_forever, daemon=True).start()
        api = functools.partial(huggingface_hub.HfApi, endpoint=f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(huggingface_hub, "HfApi", api)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        huggingface_hub.close_session()  # an earlier one may have learnt to stay offline
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield server
        server.shutdown()
    huggingface_hub.close_session()


@pytest.mark.filterwarnings("ignore")  # the client's
def test_a_push_makes_a_private_repository_and_uploads_every_file_in_one_commit(hub, exported):
    assert push(exported, "someone/tiny").endswith("/someone/tiny")
    (create, _, wish), *_, (commit, token, files) = hub.calls
    assert create == "/api/repos/create" and "private" in wish
    assert "/models/someone/tiny/commit/" in commit and token == "Bearer hf_secret"
    lines = [json.loads(line) for line in files.splitlines()]
    sent = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
    assert sent.keys() == {file.name for file in exported.iterdir()}
    assert base64.b64decode(sent["config.json"]) == (exported / "config.json").read_bytes()
    assert sum("/commit/" in path for path, *_ in hub.calls) == 1


@pytest.mark.filterwarnings("ignore")
def test_a_push_that_fails_is_one_line_without_the_token(hub, exported, monkeypatch):
    hub.status = 403
    with pytest.raises(UserError, match="export.push_to='someone/tiny': .*the model is in") as caught:
        push(exported, "someone/tiny")
    assert "hf_secret" not in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="not of the form NAME/MODEL"):
        push(exported, "../tiny")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="set HF_TOKEN"):
        push(exported, "someone/tiny")


CHAT = [{"role": "user", "content": "Is the sky blue?"}, {"role": "assistant", "content": "Yes."}]


@pytest.fixture
def config(tiny_tokenizer):
    return dataclasses.replace(CONFIG, vocab_size=len(tiny_tokenizer))


@pytest.fixture
def params(config, tmp_path):
    return hf_io.load_params(write_directory(tmp_path / "model", config), config)


@pytest.fixture
def exported(params, config, tiny_tokenizer, tmp_path):
    export(params, config, tiny_tokenizer, tmp_path / "export", card=CARD)
    return tmp_path / "export"


def test_the_model_comes_back(exported, params, config):
    assert hf_io.load_config(exported) == config
    assert_trees_equal(hf_io.load_params(exported, config), params)


def test_the_tokenizer_comes_back_with_its_chat_template(exported, tiny_tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert rendered == tiny_tokenizer.apply_chat_template(CHAT, tokenize=False) and "<|im_start|>user" in rendered
    assert tokenizer(rendered).input_ids == tiny_tokenizer(rendered).input_ids


def test_transformers_reads_config_and_generation_config(exported, tiny_tokenizer):
    read = AutoConfig.from_pretrained(exported)
    assert (read.model_type, read.eos_token_id) == ("llama", tiny_tokenizer.eos_token_id)
    generation = GenerationConfig.from_pretrained(exported)
    assert generation.eos_token_id == tiny_tokenizer.eos_token_id
    assert generation.pad_token_id == tiny_tokenizer.pad_token_id != generation.eos_token_id


@pytest.mark.parity
def test_torch_computes_the_same_logits_from_the_export(exported, params, config):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        theirs = model(torch.from_numpy(TOKENS).long()).logits.numpy()
    assert theirs.std() > 1
    np.testing.assert_allclose(theirs, logits(config, params), rtol=0, atol=1e-4)


SETTINGS = {"eos_token_id": [2, 7, 9], "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.05}


@pytest.fixture
def base(config, tmp_path):
    """A base that says more than a decoder has an opinion on; the tokenizer has other special ids."""
    directory = write_directory(tmp_path / "base", config)
    fields = json.loads((directory / "config.json").read_text())
    fields |= {"eos_token_id": 7, "bos_token_id": None, "use_cache": False, "torch_dtype": "float16"}
    (directory / "config.json").write_text(json.dumps(fields))
    (directory / "generation_config.json").write_text(json.dumps(SETTINGS))
    return directory


def test_what_training_does_not_change_is_carried_over(base, params, config, tiny_tokenizer, tmp_path):
    export(params, config, tiny_tokenizer, tmp_path / "out", base=base, card={})
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == SETTINGS
    before, after = (json.loads((d / "config.json").read_text()) for d in (base, tmp_path / "out"))
    assert before.pop("torch_dtype") == "float16" and after.pop("dtype") == "float32"
    before.pop("dtype", None)
    assert after == before and after["eos_token_id"] == 7 != tiny_tokenizer.eos_token_id


def test_a_grown_vocabulary_changes_its_size_alone(base, params, config, tiny_tokenizer, tmp_path):
    grown, larger = hf_io.resize_embeddings(params, config, config.vocab_size + 3)
    export(grown, larger, tiny_tokenizer, tmp_path / "out", base=base, card={})
    before, after = (json.loads((d / "config.json").read_text()) for d in (base, tmp_path / "out"))
    different = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert different - {"dtype"} == {"vocab_size", "torch_dtype"}
    assert hf_io.load_config(tmp_path / "out") == larger


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_stored_type_is_known(dtype, params, config, tmp_path):
    hf_io.save_params(params, config, tmp_path / "out", dtype=dtype)
    assert hf_io.stored_dtype(tmp_path / "out") == dtype


@pytest.mark.parity
def test_untouched_weights_write_the_bases_text(base, params, config, tiny_tokenizer, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    export(params, config, tiny_tokenizer, tmp_path / "out", base=base, card={})
    prompts = torch.from_numpy(np.random.default_rng(0).integers(10, 300, (8, 4)))
    texts = []
    for directory in (base, tmp_path / "out"):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        options = dict(do_sample=False, max_new_tokens=24, attention_mask=torch.ones_like(prompts), pad_token_id=0)
        texts.append(model.generate(prompts, temperature=None, top_p=None, **options).tolist())
    assert texts[0] == texts[1]


def test_an_earlier_export_is_replaced_whole(exported, params, config, tiny_tokenizer):
    (exported / "stale.json").write_text("{}")
    export(params, config, tiny_tokenizer, exported, dtype="bfloat16", card={})
    assert not (exported / "stale.json").exists()
    assert json.loads((exported / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_failed_export_leaves_the_earlier_one(exported, params, config, tiny_tokenizer, monkeypatch):
    before = {path.name: path.read_bytes() for path in exported.iterdir()}

    def fail(directory):
        raise OSError("disk full")

    monkeypatch.setattr(tiny_tokenizer, "save_pretrained", fail)
    with pytest.raises(WriteError, match="export cannot be written: disk full"):
        export(params, config, tiny_tokenizer, exported, card={})
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before
    assert sorted(path.name for path in exported.parent.iterdir()) == ["export", "model"]


def test_more_ids_than_rows_is_refused(params, tiny_tokenizer, tmp_path):
    with pytest.raises(UserError, match=f"{len(tiny_tokenizer)} ids .* {CONFIG.vocab_size} rows"):
        export(params, CONFIG, tiny_tokenizer, tmp_path / "export", card={})
    assert not (tmp_path / "export").exists()


# Reward models.

EXAMPLE = [
    {"role": "user", "content": "Is the sky blue?"},
    {"role": "assistant", "content": "Yes, it is."},
]  # the card's


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def reward_config(request, config):
    return dataclasses.replace(config, reward=True, tie_embeddings=request.param)


@pytest.fixture
def reward_params(reward_config, tmp_path):
    return hf_io.load_params(write_directory(tmp_path / "model", reward_config), reward_config)


@pytest.fixture
def eos_padded(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def ragged_pairs(eos: int, vocabulary: int = CONFIG.vocab_size) -> list[Pair]:
    """Every length differs, and every response ends with EOS."""
    random = np.random.default_rng(0)

    def ids(length):
        return random.integers(3, vocabulary, length).astype(np.int32)

    return [
        Pair(ids(2 + n), *(np.append(ids(length), eos).astype(np.int32) for length in (n, 9 - n))) for n in range(6)
    ]


def our_rewards(params, config, pairs, **layout) -> np.ndarray:
    """[2, B]: of the chosen and of the rejected responses."""
    layout = Layout(rewards=True, **layout)
    rewards = logps_of(make_decoder(config), params, first(packed(pairs, layout=layout)), needs={"reward"})
    return np.stack([rewards.chosen, rewards.rejected])


def their_rewards(model, pairs, pad: int) -> np.ndarray:
    """[2, B], all of a side in one batch padded on the right."""
    import torch

    rewards = []
    for side in ("chosen", "rejected"):
        texts = [np.concatenate([pair.prompt, getattr(pair, side)]) for pair in pairs]
        tokens, mask = np.full((2, len(texts), max(map(len, texts))), pad, np.int64)
        for row, seen, text in zip(tokens, mask, texts, strict=True):
            row[: len(text)], seen[:] = text, np.arange(len(seen)) < len(text)
        with torch.no_grad():
            out = model.eval()(torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask))
        rewards.append(out.logits[:, 0].numpy())
    return np.stack(rewards)


def test_a_reward_model_comes_back(reward_params, reward_config, tiny_tokenizer, eos_padded, tmp_path):
    out = tmp_path / "export"
    export(reward_params, reward_config, eos_padded, out, card=CARD)
    assert hf_io.load_config(out) == reward_config
    assert_trees_equal(hf_io.load_params(out, reward_config), reward_params)
    stored = load_file(out / hf_io.SINGLE)
    assert stored["score.weight"].shape == (1, CONFIG.hidden_size) and "lm_head.weight" not in stored
    assert not (out / "generation_config.json").exists()
    read = AutoConfig.from_pretrained(out)
    assert read.architectures == ["LlamaForSequenceClassification"]
    padding = tiny_tokenizer.pad_token_id  # not EOS, which ends the texts
    assert (read.num_labels, read.pad_token_id) == (1, padding)
    assert AutoTokenizer.from_pretrained(out).pad_token_id == padding != eos_padded.pad_token_id


@pytest.mark.parity
@pytest.mark.parametrize("padding", ["own", "eos"])
def test_torch_gives_the_same_rewards_from_the_export(
    padding, reward_params, reward_config, tiny_tokenizer, eos_padded, tmp_path
):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification

    tokenizer = {"own": tiny_tokenizer, "eos": eos_padded}[padding]
    export(reward_params, reward_config, tokenizer, tmp_path / "export", card={})
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "export", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    pairs = ragged_pairs(tokenizer.eos_token_id)
    theirs = their_rewards(model, pairs, AutoTokenizer.from_pretrained(tmp_path / "export").pad_token_id)
    assert theirs.std() > 1
    np.testing.assert_allclose(theirs, our_rewards(reward_params, reward_config, pairs), rtol=0, atol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize("model_type", ["Llama", "Mistral"])
@pytest.mark.parametrize("layout", [{}, {"tree": False}], ids=["tree", "ordinary"])
def test_we_give_the_same_rewards_as_torch_from_its_directory(model_type, layout, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    hf = getattr(transformers, f"{model_type}Config")(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        num_labels=1,
        initializer_range=0.4,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    model = getattr(transformers, f"{model_type}ForSequenceClassification")(hf)
    model.save_pretrained(tmp_path)
    config = hf_io.load_config(tmp_path)
    pairs = ragged_pairs(eos=2)
    theirs = their_rewards(model, pairs, pad=0)
    assert config.reward and theirs.std() > 1
    ours = our_rewards(hf_io.load_params(tmp_path, config), config, pairs, **layout)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_padding_never_ends_a_text(tiny_tokenizer, eos_padded):
    assert padded_apart(tiny_tokenizer) is tiny_tokenizer
    apart = padded_apart(eos_padded)
    assert (apart.pad_token, apart.eos_token) == ("<|pad|>", "<|im_end|>")
    assert eos_padded.pad_token == "<|im_end|>"  # the caller's is left as it was
    eos_padded.eos_token = "<|im_start|>"  # <|im_end|> still ends a turn
    assert padded_apart(eos_padded).pad_token == "<|pad|>"


@pytest.mark.parametrize(
    ("own", "unk", "bos", "found"),
    [(None, 1, 3, 1), (0, None, 3, 3), (2, 0, None, 1), (1, None, None, 1), (3, 1, None, 3)],
)
def test_what_pads_where_nothing_is_called_padding(own, unk, bos, found):
    tokenizer = Template("<|end|>")  # 0 is EOS, and 2 ends a turn
    tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id = own, unk, bos
    apart = padded_apart(tokenizer)
    assert (apart.pad_token_id if apart is tokenizer else apart.pad_token) == found
    assert tokenizer.pad_token_id == own


def test_no_padding_is_better_than_one_that_ends_a_text():
    tokenizer = Template("<|end|>")
    tokenizer.pad_token_id = tokenizer.unk_token_id = 0
    tokenizer.added_tokens_decoder = {i: tokenizer.added_tokens_decoder[i] for i in (0, 2, 3)}
    assert padded_apart(tokenizer).pad_token is None


def test_the_card_of_a_reward_model_says_so(reward_params, reward_config, tiny_tokenizer, tmp_path):
    export(reward_params, reward_config, tiny_tokenizer, tmp_path / "export", card=CARD | {"loss": "bradley_terry"})
    _, front, body = (tmp_path / "export" / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["pipeline_tag"] == "text-classification"
    assert front["tags"] == ["prefalign_jax", "preference-alignment", "reward-model", "bradley_terry", "tiny"]
    assert "A reward model: " in body and ", starting from someone/base." in body
    assert "## How to score a text" in body and "## How to load" not in body and "CausalLM" not in body


@pytest.mark.parametrize("kind", ["chat", "chat, two ends", "chat, end kept", "chat, plain", "text"])
def test_the_cards_code_makes_the_tokens_of_training(kind, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    if kind == "chat, two ends":
        tokenizer.eos_token = "<|pad|>"
    if kind == "chat, plain":  # no token ends a turn, and what follows a response is trained
        tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    if kind == "text":
        tokenizer.chat_template = None
    record = Record([EXAMPLE[0]], [EXAMPLE[1]], [])
    if kind == "text":
        record = Record(EXAMPLE[0]["content"], " " + EXAMPLE[1]["content"], "")
    keep_end = kind == "chat, end kept"
    ((pair,), _) = tokenize_records([record], tokenizer, max_length=256, keep_end=keep_end)
    code = how_to_score(tokenizer, keep_end=keep_end).splitlines()
    lines = [line for line in code if line.startswith(("chat =", "text =", "ids ="))]
    scope = {"tokenizer": tokenizer}
    exec("\n".join(lines).replace(', return_tensors="pt"', ""), scope)
    assert scope["ids"] == [*pair.prompt, *pair.chosen]
    assert pair.chosen[-1] == tokenizer.eos_token_id or keep_end


@pytest.mark.parity
@pytest.mark.parametrize("keep_end", [False, True])
def test_the_cards_code_prints_our_reward(
    keep_end, reward_params, reward_config, eos_padded, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("torch")
    card = CARD | {"config": {"data": {"keep_end": keep_end}}}
    export(reward_params, reward_config, eos_padded, tmp_path / "export", card=card)
    code = (tmp_path / "export" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "export")
    exec(code, {})
    printed = float(capsys.readouterr().out)
    records = [Record([EXAMPLE[0]], [EXAMPLE[1]], [])]
    pairs, _ = tokenize_records(records, eos_padded, max_length=256, keep_end=keep_end)
    ours = our_rewards(reward_params, reward_config, pairs, rejected=False)
    np.testing.assert_allclose(printed, ours[0, 0], rtol=0, atol=1e-4)


# Where generation ends.


# The card.


def test_card_says_what_was_trained_and_how(exported):
    text = (exported / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "base_model": "someone/base",
        "datasets": ["someone/pairs"],
        "tags": ["prefalign_jax", "preference-alignment", "dpo", "tiny"],
    }
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert headings == ["# export", "## Loss", "## Data", "## Metrics", "## Configuration", "## How to load"]
    assert "`dpo`: -log sigmoid(beta h)" in body and "| beta | 0.1 |" in body
    assert r"| over | prompt\|chosen |" in body
    assert "| training pairs | 300 |" in body
    assert "| rewards/accuracies | 0.712346 |" in body and "| loss | nan |" in body
    shown = json.loads(body.split("```json\n")[1].split("```")[0])
    assert shown == {"seed": 3, "optimizer": {"learning_rate": 5e-7}, "hub": {"revision": "main"}}
    assert "hf_abc" not in text


def test_a_card_may_be_empty():
    text = model_card({}, title="m")
    assert "## Loss" not in text and "base_model" not in text and "## How to load" in text


@pytest.mark.parametrize("base", ["/home/me/base", "./base", "../base", "~/base", "runs/base"])
def test_a_local_base_model_is_not_given_out(base, tmp_path, monkeypatch):
    (tmp_path / "runs" / "base").mkdir(parents=True)  # looks like a hub name, but is a directory
    monkeypatch.chdir(tmp_path)
    assert "base" not in model_card({"base_model": base}, title="m").split("## How to load")[0]


def test_a_local_base_speaks_by_its_own_card(tmp_path):
    front = "base_model: someone/first\nlicense: mit"
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# sft\n")
    front = yaml.safe_load(model_card({"base_model": str(tmp_path)}, title="m").split("---\n")[1])
    assert (front["base_model"], front["license"]) == ("someone/first", "mit")
    (tmp_path / "README.md").write_text("---\n[: not yaml\n---\n")
    assert "base_model" not in model_card({"base_model": str(tmp_path)}, title="m")


def test_data_sets_of_the_hub_and_set_fields_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    mix = [{"path": "someone/pairs"}, {"path": "mine/here.jsonl"}, {"path": "./mine"}]
    config = {"data": {"path": None, "eval_path": "someone/held", "mix": mix}, "lora": {"rank": None}, "steps": 3}
    text = model_card({"config": config, "name": "tiny"}, title="tiny")
    assert yaml.safe_load(text.split("---\n")[1])["datasets"] == ["someone/held", "someone/pairs"]
    shown = json.loads(text.split("```json\n")[1].split("```")[0])
    assert shown["steps"] == 3 and "lora" not in shown and "path" not in shown["data"]


def test_unknown_card_field_is_refused():
    with pytest.raises(UserError, match="unknown field 'dataset'; the fields are name, base_model, datasets"):
        model_card({"dataset": "x"}, title="m")


@pytest.mark.parametrize(
    "key", ["token", "HF_TOKEN", "accessToken", "wandb_api_key", "apiKey", "client_secret", "Password"]
)
def test_secrets_are_dropped_at_any_depth(key):
    assert without_secrets({"a": [{key: "x", "b": 1}], key: {"c": 2}}) == {"a": [{"b": 1}]}


@pytest.mark.parametrize("key", ["tokenizer", "tokens", "max_tokens", "tokens_per_row", "tokenized", "seed"])
def test_what_only_resembles_a_secret_stays(key):
    assert without_secrets({key: 1}) == {key: 1}


def test_no_field_of_a_config_is_taken_for_a_secret():
    config = read(defaults("0.5*ipo(per_token=True) + dpo"), complete=False).plain
    assert without_secrets(config) == config
    config = defaults().to_dict()
    assert without_secrets(config) == config and "decay" in config["token_weights"]
