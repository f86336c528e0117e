"""A policy: a model, its parameters, and the tokenizer that makes and reads its tokens."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jax.sharding import Mesh

from prefalign_jax.data.chat import load_tokenizer
from prefalign_jax.models.decoder import make_decoder
from prefalign_jax.models.hf_io import resolve
from prefalign_jax.models.loading import exported, load_decoder
from prefalign_jax.options import DTYPES, choose
from prefalign_jax.sharding import make_mesh, param_shardings
from prefalign_jax.types import LanguageModel, Params, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


class Policy(NamedTuple):
    """A language model, or a reward model, as it is loaded.

    Attributes:
      model: pure functions of the parameters, see `types.LanguageModel`.
      params: nested dict of float32 arrays. `policy._replace(params=...)` is the same model with others.
      tokenizer: Hugging Face tokenizer.
    """

    model: LanguageModel
    params: Params
    tokenizer: Tokenizer


def load(
    path: str | Path,
    *,
    dtype: str = "float32",
    mesh: Mesh | Mapping[str, int] | None = None,
    tokenizer: Tokenizer | None = None,
) -> Policy:
    """Loads a model with its tokenizer.

    Args:
      path: a Hugging Face directory, a hub name, a GGUF file, or the working directory of a run, whose export is taken.
      dtype: of activations and matrix products, float32 or bfloat16. Parameters, log-softmax and losses are float32.
      mesh: devices that share the parameters: a mesh of `sharding.make_mesh`, or its sizes, such as {'fsdp': -1}. None
        puts everything on one device.
      tokenizer: one to use in place of the model's own, such as its own with a chat template; it has the same tokens,
        and may have more.

    Returns:
      The `Policy`. Embeddings are grown where the tokenizer has more tokens than the model.

    Raises:
      UserError: a file is missing or does not fit, or an option is invalid.
    """
    if not isinstance(path, str | Path):
        raise UserError(f"load: expected a directory or a hub name, this is a {type(path).__name__}")
    choose("dtype", dtype, dict.fromkeys(DTYPES))
    if isinstance(mesh, Mapping):
        mesh = make_mesh(mesh)
    directory = resolve(exported(path))
    tokenizer = load_tokenizer(directory) if tokenizer is None else tokenizer
    place = functools.partial(param_shardings, mesh) if mesh is not None else None
    make = functools.partial(make_decoder, dtype=dtype)
    return Policy(*load_decoder(directory, make=make, place=place, tokens=len(tokenizer)), tokenizer)
