"""A Hugging Face directory or GGUF file -> a model and its parameters, where they belong: the one way in, for all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from prefalign_jax.files import read_json
from prefalign_jax.models.decoder import DecoderConfig, make_decoder
from prefalign_jax.models.families import reward_architecture
from prefalign_jax.models.hf_io import left_out, load_config, load_params, pad_vocabulary, resize_embeddings, resolve
from prefalign_jax.models.quantize import quantize_params
from prefalign_jax.processes import note
from prefalign_jax.types import LanguageModel, Params


def exported(path: str | Path) -> str:
    """The export of a run's working directory; any other path as it is."""
    inside = Path(path).expanduser() / "export"
    return str(inside if (inside / "config.json").exists() else path)


def told_in_run(path: str | Path, **given: Any) -> dict[str, Any]:
    """What a chat template is told, and may leave out: as it is given, else as in the run that made the model.

    Args:
      path: of a run's working directory, or its export; any other path has no run.
      **given: options of `template.chat_options`; what says nothing is looked up.
    """
    local = Path(path).expanduser()
    directory = local.parent if local.name == "export" else local
    of_run = read_json(directory / "config.json", "an object", missing={}).get("data")
    known = of_run if isinstance(of_run, dict) else {}  # a model's own config.json has no such field
    return {name: known.get(name) if value in (None, "") else value for name, value in given.items()}


def drawn_params(shape: DecoderConfig, key: jax.Array, *, dtype: str, quantize: str | None = None) -> Params:
    """Parameters that no file holds, their kernels quantized if that is asked for."""
    params = make_decoder(shape, param_dtype=dtype).init(key)
    return quantize_params(params, quantize) if quantize else params


def load_decoder(
    path: str | Path,
    *,
    make: Callable[[DecoderConfig], LanguageModel] = make_decoder,
    place: Callable[[Params], Any] | None = None,
    reward: bool | None = None,
    tokens: int = 0,
    multiple: int = 1,
    dtype: str = "float32",
    quantize: str | None = None,
    drawn: jax.Array | None = None,
) -> tuple[LanguageModel, Params]:
    """A model and its parameters on their shardings, the embeddings grown where the tokenizer has more tokens.

    Args:
      path: Hugging Face directory, hub name or GGUF file.
      make: the model of a shape.
      place: shapes of parameters -> a tree of their shardings; None puts them on the default device.
      reward: a reward head in place of the output embedding; None does as the directory.
      tokens: len(tokenizer).
      multiple: rows of embedding and head are padded to a multiple of this, without probability.
      dtype: of the parameters, or 'stored' for the type in the file.
      quantize: one of quantize.QUANTIZATIONS for the kernels of the linear layers.
      drawn: a random key; the parameters are drawn then, and only the shape is taken from `path`.

    Returns:
      (model, params), without adapters.

    Raises:
      UserError: files are missing or do not fit.
    """
    directory = resolve(path)
    shape = load_config(directory)
    if reward is not None:
        shape = dataclasses.replace(shape, reward=reward)
    if shape.reward:
        reward_architecture(shape)  # or its export could not be loaded
    size = max(shape.vocab_size, tokens)
    grown = dataclasses.replace(shape, vocab_size=size, vocab_padding=-size % multiple)

    def draw(shape: DecoderConfig, key: jax.Array) -> Params:
        return drawn_params(shape, key, dtype="float32" if dtype == "stored" else dtype, quantize=quantize)

    def shardings(make_params: Callable[..., Params], *args: Any) -> Any:
        return place(jax.eval_shape(make_params, *args)) if place else None

    def born(make_params: Callable[..., Params], *args: Any) -> Params:
        return jax.jit(make_params, out_shardings=shardings(make_params, *args))(*args)

    model = make(grown)
    if drawn is not None:
        return model, born(lambda: draw(grown, drawn))
    where = shardings(lambda: draw(shape, jax.random.key(0)))
    params = load_params(directory, shape, dtype=dtype, quantize=quantize, shardings=where)
    if left := left_out(directory):
        note(f"{path}: only the text model is read; {left} other tensors are left out")
    if tokens > shape.vocab_size:
        note(f"embeddings grown from {shape.vocab_size} to {tokens} rows for the tokens added to the vocabulary")
    if grown != shape:
        tables = {name: params[name] for name in ("embed", "head") if name in params}
        params = params | born(lambda old: pad_vocabulary(*resize_embeddings(old, shape, size), multiple)[0], tables)
    return model, params
