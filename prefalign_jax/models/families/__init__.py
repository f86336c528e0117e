"""Hugging Face model families: their configuration fields and tensor names, as tables read in both directions.

A new family is a table in one of the files beside this one, a line in FAMILIES, and a line in the parity test.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from prefalign_jax.models.decoder_config import DecoderConfig
from prefalign_jax.models.families import (
    cohere,
    exaone,
    gemma,
    glm,
    gpt,
    gpt_oss,
    granite,
    llama,
    ministral,
    mixtral,
    multimodal,
    olmo,
    phi,
    qwen3_5,
    starcoder2,
)
from prefalign_jax.models.families.family import SCORE, Family, Weight, check_shapes, unsupported
from prefalign_jax.types import UserError

__all__ = ["FAMILIES", "SCORE", "Family", "Weight", "family", "from_hf", "is_reward", "name_of", "to_hf", "weights"]

MOST_LAYERS = 10_000
FAMILIES: dict[str, Family] = {
    **llama.FAMILIES,
    **qwen3_5.FAMILIES,
    **ministral.FAMILIES,
    **mixtral.FAMILIES,
    **phi.FAMILIES,
    **starcoder2.FAMILIES,
    **gpt.FAMILIES,
    **gpt_oss.FAMILIES,
    **gemma.FAMILIES,
    **olmo.FAMILIES,
    **granite.FAMILIES,
    **glm.FAMILIES,
    **exaone.FAMILIES,
    **cohere.FAMILIES,
}


def family(model_type: str | None) -> Family:
    """Looks up a `model_type`.

    Raises:
      UserError: the type is not supported.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        of_a_run = "; of a run name the directory WORKDIR/export" * (model_type is None)
        raise UserError(f"model_type={model_type!r} is not supported{of_a_run}; supported are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def text_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the text model of one that sees images as well: a key of `multimodal.TEXT`.

    Args:
      hf: the content of config.json.

    Returns:
      The text model's, with the token ids and the types of the whole.

    Raises:
      UserError: the text model is not supported, or this is a reward model.
    """
    text = hf.get("text_config")
    if not isinstance(text, dict):
        raise unsupported("text_config", text, "an object")
    text = {**multimodal.TEXT[hf["model_type"]], **text}
    architectures = hf.get("architectures") or []
    if any("Sequence" in str(name) for name in architectures):
        raise unsupported("architectures", architectures, "a language model")
    whole = {name: hf[name] for name in multimodal.SHARED if hf.get(name) is not None and text.get(name) is None}
    return {**text, **whole, "architectures": [family(text["model_type"]).architecture]}


def is_reward(hf: Mapping[str, Any]) -> bool:
    """Whether a config.json is a reward model's: transformers has it as a classifier with one label.

    Raises:
      UserError: the `model_type` is not supported.
    """
    known = family(hf.get("model_type"))
    check_shapes(hf, known.fields)
    return known.reward_architecture in (hf.get("architectures") or ())


def reward_architecture(config: DecoderConfig) -> str:
    """The class by which transformers loads a reward model of this family.

    Raises:
      UserError: it has none.
    """
    if (name := family(config.family).reward_architecture) is None:
        raise UserError(f"transformers has no reward model of model_type={config.family!r}; take another family")
    return name


def from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the fields of a config.json.

    Args:
      hf: the file's contents, as transformers 4 or 5 writes them.

    Returns:
      Keyword arguments of `DecoderConfig`.

    Raises:
      UserError: a field is missing, or has a value that the decoder does not compute.

    Example:
      >>> from_hf({"model_type": "llama"})
      Traceback (most recent call last):
      prefalign_jax.types.UserError: config.json has no vocab_size; it needs one for model_type='llama'
    """
    known, reward = family(hf.get("model_type")), is_reward(hf)
    hf = {**known.defaults, **{key: value for key, value in hf.items() if value is not None or key in known.defaults}}
    fields = {ours: hf[theirs] for ours, theirs in known.fields.items() if hf.get(theirs) is not None}
    for ours in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"):
        if ours in known.fields and ours not in fields:
            raise UserError(
                f"config.json has no {known.fields[ours]}; it needs one for model_type={hf['model_type']!r}"
            )
    stored = hf.get("quantization_config")
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    if stored is not None and method not in known.quantizations:
        name = "quantization_config" if method is None else "quantization_config.quant_method"
        raise unsupported(name, method or stored, ", ".join((*known.quantizations, "None")))
    for name, value in known.fixed.items():
        if hf.get(name) is not None and hf[name] != value:
            raise unsupported(name, hf[name], repr(value))
    fields.setdefault("num_kv_heads", fields["num_heads"])
    fields.setdefault("head_dim", fields["hidden_size"] // fields["num_heads"])
    if fields["num_heads"] % fields["num_kv_heads"]:
        raise unsupported("num_key_value_heads", fields["num_kv_heads"], "a divisor of num_attention_heads")
    if fields["head_dim"] % 2 or not fields["head_dim"]:
        raise unsupported("head_dim", fields["head_dim"], "an even number")
    if fields["num_layers"] > MOST_LAYERS:
        raise unsupported(known.fields["num_layers"], fields["num_layers"], f"at most {MOST_LAYERS}")
    labels = hf.get("id2label") or range(hf.get("num_labels") or 1)
    if reward and len(labels) != 1:
        raise unsupported("num_labels", len(labels), "1, a reward model")
    fields |= known.read(hf)
    if not fields.get("experts_per_token", 0) <= (fields.get("num_experts") or math.inf):
        raise unsupported("num_experts_per_tok", fields["experts_per_token"], "at most the number of experts")
    return {**known.constant, **fields, "reward": reward, "family": hf["model_type"]}


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Writes the fields of a config.json that both transformers 4 and 5 read.

    Args:
      config: the decoder's shape.

    Returns:
      The fields that describe the computation; token ids and types are the caller's to add. Until then there are no
      ids, where silence would mean those of the family's first model: SmolLM 3's and Phi-3's padding lies beyond a
      smaller vocabulary, and transformers could not load it.
    """
    known = family(config.family)
    # The length of id2label is how transformers counts the labels; without it there are 2.
    labels = {"id2label": {"0": "reward"}, "label2id": {"reward": 0}} if config.reward else {}
    return {
        "architectures": [reward_architecture(config) if config.reward else known.architecture],
        "model_type": config.family,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        **labels,
        **{theirs: getattr(config, ours) for ours, theirs in known.fields.items()},
        **known.fixed,
        **known.write(config),
    }


def weights(config: DecoderConfig) -> Iterator[tuple[str, tuple[Weight, ...], int | tuple[int, int] | None]]:
    """Every tensor of a model, in the order in which files hold them.

    Args:
      config: the decoder's shape; a tied model has no head of its own, a reward model a score.

    Yields:
      (Hugging Face name, the table rows that share it, where on the parameter's leading axes it lies: the layer's
      number, among those of its kind where there are two, or that and the expert's; None if the parameter is not
      stacked).
    """
    heads = {"head/kernel": "head", "head/bias": "head", "score/kernel": "score"}
    wanted = config.head_path.partition("/")[0]
    biased = dict.fromkeys((f"attention/{x}/bias" for x in "qkv"), config.qkv_bias)
    biased |= {"attention/o/bias": config.output_bias, "head/bias": config.head_bias}
    biased |= dict.fromkeys((f"mlp/{x}/bias" for x in ("gate", "up", "down")), config.mlp_bias)
    groups: list[list[Weight]] = []
    for row in family(config.family).weights:
        if heads.get(row.path, wanted) != wanted or not biased.get(row.path.removeprefix("layers/"), True):
            continue
        if groups and groups[-1][0].name == row.name:
            groups[-1].append(row)
        else:
            groups.append([row])
    first = next(i for i, rows in enumerate(groups) if "{}" in rows[0].name)
    last = max(i for i, rows in enumerate(groups) if "{}" in rows[0].name) + 1
    for rows in groups[:first]:
        yield rows[0].name, tuple(rows), None
    deltas = config.delta_layers or (False,) * config.num_layers
    for n in range(config.num_layers):
        place = deltas[:n].count(deltas[n])
        for rows in groups[first:last]:
            name, of = rows[0].name, rows[0].path.split("/")[1]
            if of == ("attention" if deltas[n] else "delta"):
                continue
            if name.count("{}") == 1:
                yield name.format(n), tuple(rows), place if of in ("attention", "delta") else n
                continue
            for e in range(config.num_experts):
                yield name.format(n, e), tuple(rows), (n, e)
    for rows in groups[last:]:
        yield rows[0].name, tuple(rows), None


def name_of(config: DecoderConfig, path: str) -> str | None:
    """The Hugging Face name of an unstacked parameter, None if the family has no such row."""
    return next((row.name for row in family(config.family).weights if row.path == path), None)
