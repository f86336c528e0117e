"""A finished model as a Hugging Face directory: weights, tokenizer, generation settings and a model card.

A reward model is read by transformers' AutoModelForSequenceClassification, which takes the reward at the last token
that is not padding. Where a tokenizer pads with the token that ends a text, as many chat models' do, that would be the
token before it: such a tokenizer is exported with another padding token.
"""

from __future__ import annotations

import copy
import functools
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import huggingface_hub
import yaml

from prefalign_jax.config import defaults
from prefalign_jax.experiment import Experiment
from prefalign_jax.files import write_json, write_text
from prefalign_jax.gguf.file import gguf_file, read_gguf, title
from prefalign_jax.models import hf_io
from prefalign_jax.models.decoder import DecoderConfig
from prefalign_jax.models.endings import end_of_turn, generation_config, special_tokens
from prefalign_jax.models.lora import Lora
from prefalign_jax.models.peft_io import save_adapters
from prefalign_jax.options import flatten
from prefalign_jax.processes import agreed, by_first, is_first, note
from prefalign_jax.tables import markdown
from prefalign_jax.types import Params, UserError, WriteError, one_line

# What a card may say.
CARD = {
    "name": "the model's name",
    "base_model": "hub name or directory of the model that training started from",
    "datasets": "hub names of the data sets; those of the configuration where it is left out",
    "tags": "more tags",
    "license": "licence identifier",
    "loss": "name of the loss",
    "loss_title": "the loss's name in words",
    "formula": "the loss in one line",
    "training": "mapping: how weights were updated, and which are the result",
    "hyper_parameters": "mapping: the loss's hyper-parameters",
    "data": "text or mapping: what the model was trained on",
    "metrics": "mapping: name to number",
    "history": "where the run was resumed with other values, from checkpoint.record_changes",
    "config": "mapping: the run's whole configuration",
}
_SECRET = re.compile(r"token(?!s|iz)|secret|password|api_?key", re.IGNORECASE)
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def export(
    params: Params,
    config: DecoderConfig,
    tokenizer: Any,
    directory: str | pathlib.Path,
    *,
    dtype: str = "float32",
    base: str | pathlib.Path | None = None,
    card: Mapping[str, Any],
) -> None:
    """Writes a directory that transformers loads; it appears whole or not at all, and replaces an earlier export.

    Of several processes all call, and the first writes.

    Args:
      params: the parameter tree of `make_decoder`, adapters merged.
      config: the decoder's shape.
      tokenizer: a Hugging Face tokenizer; its chat template goes with it. It is not changed.
      directory: where to.
      dtype: stored type, one of `hf_io.DTYPES`.
      base: directory of the model that training started from. What its config.json and generation_config.json say and
        training did not change is kept, such as special ids and sampling settings.
      card: what the model card says, with keys of CARD; fields whose names sound like secrets are left out.

    Raises:
      UserError: the tokenizer has more ids than the model, the card has an unknown key, the directory holds something
        else, or the parameters cannot be stored (see `hf_io.save_params`).
    """
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} ids but the model's embedding {config.vocab_size} rows; "
            "resize the embedding before training"
        )
    directory = pathlib.Path(directory)
    scoring = None
    if config.reward:
        scoring = how_to_score(tokenizer, keep_end=_keeps_end(card))
        tokenizer = padded_apart(tokenizer)
    text = model_card(card, title=card.get("name") or directory.name, scoring=scoring)
    stored = {} if base is None else hf_io.read_object(pathlib.Path(base) / "config.json")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ids = {name: i for name, i in ids.items() if name not in stored or (config.reward and name == "pad_token_id")}
    with hf_io.replacing(directory) as fresh:
        hf_io.write_params(params, config, fresh, dtype=dtype, base=base, extra=ids)
        if is_first():
            tokenizer.save_pretrained(fresh)
            if not config.reward:
                write_json(fresh / "generation_config.json", generation_config(tokenizer, base))
            (fresh / "README.md").write_text(text)
    agreed("written")  # what comes next may read it in any process


def export_run(
    experiment: Experiment,
    params: Params,
    shape: DecoderConfig,
    tokenizer: Any,
    workdir: pathlib.Path,
    *,
    data: str,
    metrics: Mapping[str, float],
    history: Sequence[Mapping[str, Any]] = (),
    directory: pathlib.Path | None = None,
) -> None:
    """Exports what a run trained, and pushes it to the hub if the config says so.

    Args:
      experiment: of the run.
      params, shape, tokenizer: as in `export`.
      workdir: of the run.
      data: what it was trained on, in words.
      metrics: its evaluation at the step that is exported.
      history: from `checkpoint.record_changes`.
      directory: where to; None is WORKDIR/export.

    Raises:
      UserError: as `export` and `push`.
    """
    config, loss = experiment.config, experiment.loss
    card = {"base_model": config.model.path, "data": data, "metrics": metrics, "config": experiment.plain}
    card |= {
        "training": experiment.training,
        "loss": loss.name,
        "loss_title": loss.title,
        "formula": loss.formula,
        "hyper_parameters": loss.hyper,
    }
    card |= {"name": (config.export.push_to or workdir.resolve().name).rpartition("/")[2], "history": history}
    base, dtype = hf_io.resolve(config.model.path), config.export.dtype
    if dtype == "stored":
        dtype = "float32" if config.model.random_init else hf_io.stored_dtype(base)
    directory = directory or workdir / "export"
    export(params, shape, tokenizer, directory, dtype=dtype, base=base, card=card)
    note(f"exported to {directory}")
    if config.export.push_to:
        by_first(lambda: note(f"pushed to {push(directory, config.export.push_to)}"))


def export_adapters(
    experiment: Experiment,
    adapters: Params,
    lora: Lora,
    shape: DecoderConfig,
    workdir: pathlib.Path,
    directory: pathlib.Path | None = None,
) -> None:
    """Writes adapters in PEFT's format to WORKDIR/adapters, or says why that format cannot hold them."""
    model, directory = experiment.config.model, directory or workdir / "adapters"
    try:
        if hf_io.sees(hf_io.resolve(model.path)):
            raise UserError(
                "the adapters are not written in PEFT's format, whose names for a text model are others than those of "
                f"{model.path}; the export has them merged"
            )
        save_adapters(adapters, shape, lora, directory, base=model.path, quantized=model.quantize)
        if is_first():
            card = adapter_card(model.path, model.quantize, workdir.resolve().name)
            write_text(directory / "README.md", card)
        note(f"adapters in PEFT's format in {directory}")
    except WriteError:
        raise
    except UserError as error:  # the format lacks such layers; the merged export has them
        note(str(error))


def hub_token(repository: str) -> str:
    """The token for the Hugging Face hub, from HF_TOKEN or an earlier `hf auth login`.

    Args:
      repository: NAME/MODEL that it is for.

    Raises:
      UserError: there is none, or the name is not of that form.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repository):
        raise UserError(f"export.push_to={repository!r} is not of the form NAME/MODEL")
    token = huggingface_hub.get_token()
    if not token:
        raise UserError(f"export.push_to={repository!r} needs a token for the hub; set HF_TOKEN in the environment")
    return token


def push(directory: str | pathlib.Path, repository: str) -> str:
    """Uploads an exported directory to the Hugging Face hub as one commit; a repository that is new is private.

    Args:
      directory: from `export`.
      repository: NAME/MODEL.

    Returns:
      Its address.

    Raises:
      UserError: there is no token, or the hub refuses; what was exported stays as it is.
    """
    api = huggingface_hub.HfApi(token=hub_token(repository))
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=directory, commit_message="Model trained by prefalign_jax")
    except Exception as error:  # of whatever kind: a finished run does not end in a traceback
        reason = one_line(error)
        raise UserError(f"export.push_to={repository!r}: {reason}; the model is in {directory}") from error
    return str(address)


def padded_apart(tokenizer: Any) -> Any:
    """The tokenizer with a padding token that ends no text.

    Args:
      tokenizer: a Hugging Face tokenizer.

    Returns:
      The tokenizer itself if its padding token is one, or else a copy that pads with another of its special tokens. If
      there is no other, a copy without: transformers then scores texts one at a time and refuses to take several.
    """
    ends = {None, tokenizer.eos_token_id, end_of_turn(tokenizer)}
    if tokenizer.pad_token_id not in ends:
        return tokenizer
    special = {i: text for text, i in special_tokens(tokenizer).items()}
    meant = [i for i, text in special.items() if "pad" in text.lower()]
    candidates = [*meant, tokenizer.unk_token_id, tokenizer.bos_token_id, *special]
    tokenizer = copy.deepcopy(tokenizer)
    padding = next((i for i in candidates if i not in ends), None)
    tokenizer.pad_token = None if padding is None else tokenizer.convert_ids_to_tokens(padding)
    return tokenizer


def how_to_score(tokenizer: Any, *, keep_end: bool = False) -> str:
    """Python that scores a text with an exported reward model, its tokens made as they were for training.

    Args:
      tokenizer: a Hugging Face tokenizer; whether it has a chat template decides what a text is.
      keep_end: whether training kept what the template writes after its end of turn.

    Returns:
      Lines of code, the last of which prints the reward.
    """
    if tokenizer.chat_template:
        text = [
            'chat = [{"role": "user", "content": "Is the sky blue?"}, {"role": "assistant", "content": "Yes, it is."}]',
            "text = tokenizer.apply_chat_template(chat, tokenize=False)",
        ]
        special = "False"  # the template writes its own
    else:
        text = ['text = "Is the sky blue?" + " Yes, it is."  # prompt and response']
        special = "True"
    ends = end_of_turn(tokenizer) is not None
    if not (ends and keep_end):
        whole = "text.rstrip().removesuffix(tokenizer.eos_token)" if ends else "text"
        text += [
            "# The reward is read at the last token, which in training was the end of sequence.",
            f"text = {whole} + tokenizer.eos_token",
        ]
    return "\n".join(
        [
            "import torch",
            "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
            "",
            'path = "."  # this directory, or its name on the hub',
            "model = AutoModelForSequenceClassification.from_pretrained(path)",
            "tokenizer = AutoTokenizer.from_pretrained(path)",
            "",
            *text,
            f'ids = tokenizer(text, add_special_tokens={special}, return_tensors="pt").input_ids',
            "with torch.no_grad():",
            "    print(model(ids).logits[0, 0].item())",
        ]
    )


def model_card(card: Mapping[str, Any], *, title: str, scoring: str | None = None) -> str:
    """Writes README.md: front matter for the hub, then loss, data, metrics, configuration and how to load.

    Args:
      card: keys of CARD, any of them left out.
      title: the model's name.
      scoring: of a reward model, the code from `how_to_score`.

    Returns:
      Markdown with YAML front matter.

    Raises:
      UserError: a key is not in CARD.
    """
    unknown = sorted(set(card) - set(CARD))
    if unknown:
        raise UserError(f"model card: unknown field {unknown[0]!r}; the fields are {', '.join(CARD)}")
    card = without_secrets(card)
    origin = _origin(card)
    tags = [
        "prefalign_jax",
        "preference-alignment",
        *([] if scoring is None else ["reward-model"]),
        *([card["loss"]] if card.get("loss") else []),
        *card.get("tags", ()),
    ]
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation" if scoring is None else "text-classification",
        "license": origin.license,
        "base_model": origin.hub_name,
        "datasets": list(card.get("datasets") or _hub_data(card.get("config") or {})),
        "tags": list(dict.fromkeys(tags)),
    }
    front = {name: value for name, value in front.items() if value}
    what = "Aligned with human preferences by prefalign_jax" if scoring is None else _REWARD_MODEL
    sections = [
        "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---",
        f"# {title}",
        what + (f", starting from {origin.called}." if origin.called else "."),
    ]
    if card.get("loss"):
        title = f"{card['loss_title']}, " if card.get("loss_title") else ""
        formula = f": {card['formula']}" if card.get("formula") else ""
        sections += [
            "## Loss",
            f"{title}`{card['loss']}`{formula}",
            _table("hyper-parameter", card.get("hyper_parameters")),
        ]
    if card.get("training"):
        sections += ["## Training", _table("", card["training"])]
    if card.get("data"):
        data = card["data"]
        sections += ["## Data", _table("", data) if isinstance(data, Mapping) else str(data)]
    if card.get("metrics"):
        sections += ["## Metrics", _table("metric", card["metrics"])]
    if card.get("history"):
        sections += ["## Resumed with other values", _history(card["history"])]
    if card.get("config"):
        plain = _set_fields(card["config"])
        sections += ["## Configuration", "```json\n" + json.dumps(plain, indent=2, default=str) + "\n```"]
    sections += ["## How to load", _LOAD] if scoring is None else ["## How to score a text", _python(scoring)]
    return "\n\n".join(section for section in sections if section) + "\n"


def without_secrets(value: Any) -> Any:
    """A copy of nested mappings and lists, less the fields whose names sound like secrets; those of a config are none.

    Example:
      >>> without_secrets({"hf_token": "x", "max_tokens": 8, "data": [{"api_key": "y", "tokenizer": "z"}]})
      {'max_tokens': 8, 'data': [{'tokenizer': 'z'}]}
    """
    if isinstance(value, Mapping):
        return {key: without_secrets(item) for key, item in value.items() if not _sounds_secret(str(key))}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    return value


def _sounds_secret(name: str) -> bool:
    return bool(_SECRET.search(name)) and name.rpartition(".")[2] not in _config_names()


@functools.cache
def _config_names() -> frozenset[str]:
    """The names of a config's groups and fields, such as token_weights and per_token."""
    return frozenset(part for name in flatten(defaults().to_dict()) for part in name.split("."))


def adapter_card(base: str, quantized: str | None, title: str) -> str:
    """Writes README.md of adapters in PEFT's format: their base, and how it was stored while they were trained.

    Args:
      base: hub name or directory of the model that they belong to.
      quantized: see config.model.quantize.
      title: the model's name.

    Returns:
      Markdown with YAML front matter.
    """
    origin = _origin({"base_model": base})
    front = {"library_name": "peft", "base_model": origin.hub_name, "license": origin.license}
    front["tags"] = ["prefalign_jax", "lora"]
    front = {key: value for key, value in front.items() if value}
    text = "---\n" + yaml.safe_dump(front, sort_keys=False) + f"---\n\n# {title}\n\nLow-rank adapters in PEFT's format"
    text += f" for {origin.called}.\n" if origin.called else ".\n"
    if quantized:
        text += (
            f"\nThey were trained over a base whose kernels were stored as {quantized}. Load the base quantized in the "
            "same way: over the full-precision base the model computes something slightly else.\n"
        )
    return text


class _Origin(NamedTuple):
    """The base of a model: what it is called, its name on the hub or '', and its licence."""

    called: str
    hub_name: str
    license: str | None


def _origin(card: Mapping[str, Any]) -> _Origin:
    """The base that a card names: one in a directory says what it is on its own card, if it has one."""
    base = str(card.get("base_model") or "")
    if file := gguf_file(base or "?"):
        license_ = read_gguf(file).metadata.get("general.license")
        return _Origin(title(file), "", card.get("license") or (license_ if isinstance(license_, str) else None))
    if not pathlib.Path(base or "?").is_dir():
        name = base if _HUB_NAME.fullmatch(base) else ""
        return _Origin(name, name, card.get("license"))
    front = front_matter(pathlib.Path(base) / "README.md")
    name, license_ = front.get("base_model"), front.get("license")
    name = name if isinstance(name, str) and _HUB_NAME.fullmatch(name) else ""
    return _Origin(name, name, card.get("license") or (license_ if isinstance(license_, str) else None))


def front_matter(card: pathlib.Path) -> dict[str, Any]:
    """What a model card says to the hub, {} if there is no card or its front matter cannot be read."""
    try:
        match = re.match(r"---\n(.*?)\n---\s", card.read_text(encoding="utf-8"), re.DOTALL)
        front = yaml.safe_load(match[1]) if match else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return front if isinstance(front, dict) else {}


def _hub_data(config: Mapping[str, Any]) -> list[str]:
    """Hub names of the data sets that a configuration trains or evaluates on."""
    data = config.get("data") or {}
    sources = [{"path": data.get("path")}, {"path": data.get("eval_path")}, *(data.get("mix") or ())]
    names = [str(source.get("path") or "") for source in sources if isinstance(source, Mapping)]
    return [name for name in dict.fromkeys(names) if "/" in name and _is_hub_name(name)]


def _is_hub_name(name: str) -> bool:
    """Whether a name is the hub's: a path of the machine that trained the model means nothing to a reader."""
    suffixes = (".json", ".jsonl", ".gz", ".parquet", ".csv", ".tsv", ".arrow")
    return bool(_HUB_NAME.fullmatch(name)) and not pathlib.Path(name).exists() and not name.endswith(suffixes)


def _history(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [(row["step"], name, *map(str, pair)) for row in rows for name, pair in row["changed"].items()]
    return markdown(("from step", "field", "before", "now"), cells)


def _set_fields(value: Any) -> Any:
    """Nested mappings without the fields that are None, and without groups of which no field is left."""
    if not isinstance(value, Mapping):
        return value
    fields = {key: _set_fields(item) for key, item in value.items()}
    return {key: item for key, item in fields.items() if item is not None and item != {}}


_REWARD_MODEL = (
    "A reward model: it gives a prompt with its response one number, the higher the more people would prefer it. Only "
    "differences between responses to one prompt have a meaning. Trained on human preferences by prefalign_jax"
)


def _python(code: str) -> str:
    return f"```python\n{code}\n```"


_LOAD = _python("""from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this directory, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)""")


def _keeps_end(card: Mapping[str, Any]) -> bool:
    """Whether the run's configuration on the card has data.keep_end."""
    return bool(((card.get("config") or {}).get("data") or {}).get("keep_end"))


def _table(name: str, rows: Mapping[str, Any] | None) -> str:
    if not rows:
        return ""
    return markdown(
        (name, "value"),
        [(key, f"{value:.6g}" if isinstance(value, float) else str(value)) for key, value in rows.items()],
    )
