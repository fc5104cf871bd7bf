"""Metrics and logs: one catalogue, injected registries."""
