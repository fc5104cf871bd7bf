"""Metrics, logs and traces: one catalogue, injected registries and tracers."""
