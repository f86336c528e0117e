"""prefalign_jax: aligning language models with human preferences in JAX (DPO, ORPO and relatives)."""

__version__ = "0.1.0"
