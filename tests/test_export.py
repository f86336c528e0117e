import dataclasses
import json

import numpy as np
import pytest
import yaml
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from prefalign_jax.export import end_of_turn, export, generation_config, model_card, without_secrets
from prefalign_jax.models import hf_io
from prefalign_jax.types import UserError
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
    with pytest.raises(OSError, match="disk full"):
        export(params, config, tiny_tokenizer, exported, card={})
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before
    assert sorted(path.name for path in exported.parent.iterdir()) == ["export", "model"]


def test_more_ids_than_rows_is_refused(params, tiny_tokenizer, tmp_path):
    with pytest.raises(UserError, match=f"{len(tiny_tokenizer)} ids .* {CONFIG.vocab_size} rows"):
        export(params, CONFIG, tiny_tokenizer, tmp_path / "export", card={})
    assert not (tmp_path / "export").exists()


# Where generation ends.


class Template:
    """A tokenizer as far as the end of a turn goes."""

    def __init__(self, after: str, eos: int | None = 0):
        self.chat_template, self.after = "a template", after
        self.bos_token_id, self.eos_token_id, self.pad_token_id = None, eos, None
        token = type("Token", (), {})
        self.added_tokens_decoder = {}
        for i, (text, special) in enumerate([("</s>", True), ("<|end", True), ("<|end|>", True), ("<br>", False)]):
            self.added_tokens_decoder[i] = token()
            self.added_tokens_decoder[i].content, self.added_tokens_decoder[i].special = text, special

    def apply_chat_template(self, chat, tokenize):
        return "".join(f"[{m['role']}]{m['content']}{self.after}" for m in chat)


@pytest.mark.parametrize(
    ("after", "turn", "eos"),
    [
        ("<|end|>\n", 2, [0, 2]),  # the longest token that fits, not its prefix
        ("\n<|end|>", 2, [0, 2]),
        ("</s>\n", 0, 0),
        (" </s><|end|>", 0, 0),
        ("\n\nHuman:", None, 0),
        ("<br>", None, 0),
        ("", None, 0),
    ],
)
def test_generation_ends_at_eos_and_at_the_end_of_a_turn(after, turn, eos):
    assert end_of_turn(Template(after)) == turn
    assert generation_config(Template(after)) == {"eos_token_id": eos}


def test_no_template_and_no_eos():
    tokenizer = Template("<|end|>", eos=None)
    assert generation_config(tokenizer) == {"eos_token_id": 2}
    tokenizer.chat_template = None
    assert generation_config(tokenizer) == {}


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


def test_unknown_card_field_is_refused():
    with pytest.raises(UserError, match="unknown field 'dataset'; the fields are base_model, datasets"):
        model_card({"dataset": "x"}, title="m")


@pytest.mark.parametrize(
    "key", ["token", "HF_TOKEN", "accessToken", "wandb_api_key", "apiKey", "client_secret", "Password"]
)
def test_secrets_are_dropped_at_any_depth(key):
    assert without_secrets({"a": [{key: "x", "b": 1}], key: {"c": 2}}) == {"a": [{"b": 1}]}


@pytest.mark.parametrize("key", ["tokenizer", "tokens", "max_tokens", "tokens_per_row", "tokenized", "seed"])
def test_what_only_resembles_a_secret_stays(key):
    assert without_secrets({key: 1}) == {key: 1}
