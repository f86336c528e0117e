"""Measuring a policy on held-out pairs and on samples of its own."""
