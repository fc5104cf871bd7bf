"""Readers: how a decode step reads packed KV."""
