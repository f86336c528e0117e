"""Negative log-likelihood of the chosen response: supervised fine-tuning, and the first term of ORPO."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from prefalign_jax.losses.ratios import Result, batch_mean
from prefalign_jax.types import PairLogps

OVER = ("chosen", "prompt+chosen", "text")
MEAN = ("pair", "batch")


def nll(policy: PairLogps, *, over: str, mean: str) -> jax.Array:
    """Each pair's share of the mean negative log-likelihood per token.

    Args:
      policy: [B] float32 log-probabilities and token counts.
      over: 'chosen' for the response's tokens, 'prompt+chosen' for those of the prompt after its first as well, 'text'
        for the latter without end-of-sequence tokens.
      mean: 'pair' divides by the pair's own tokens, so that every pair counts alike; 'batch' by the mean number of
        tokens per pair over the global batch, so that every token counts alike once the pairs are averaged.

    Returns:
      [B] float32.
    """
    total, tokens = policy.chosen, policy.chosen_tokens
    if over == "prompt+chosen":
        total, tokens = total + policy.prompt, tokens + policy.prompt_tokens
    if over == "text":
        total, tokens = policy.text, policy.text_tokens
        if mean == "batch":
            tokens = batch_mean(tokens, policy)
    elif mean == "batch":
        prompt, chosen = policy.mean_tokens[0], policy.mean_tokens[1]
        tokens = chosen + (prompt if over == "prompt+chosen" else 0.0)
    return -total / jnp.maximum(tokens, 1.0)


def sft(policy: PairLogps, reference: None = None, *, over: str = "chosen", mean: str = "batch") -> Result:
    """Supervised fine-tuning (SFT).

    -log pi_w / n, n the mean number of tokens over the batch's pairs

    On the chosen responses of preference data it is the DPO paper's preferred-FT.

    Args:
      policy: [B] float32 log-probabilities and token counts.
      reference: none; the rejected response is not looked at either.
      over: 'chosen' or 'prompt+chosen', see `nll`.
      mean: 'batch' (as TRL) or 'pair', see `nll`.

    Returns:
      (loss [B], metrics {name: [B]}).

    TRL: SFTTrainer's loss on completions, and DPOTrainer's `sft`, equal.
    Source: Hong et al., arXiv 2403.07691, Eq. 2; preferred-FT: Rafailov et al., arXiv 2305.18290, section 6.
    """
    loss = nll(policy, over=over, mean=mean)
    return loss, {"nll_loss": loss, "logps/chosen": policy.chosen}
