"""Drawing text from a model, and what was drawn."""
