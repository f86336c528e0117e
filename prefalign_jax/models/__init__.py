"""Decoders as pure functions, and their Hugging Face files."""
