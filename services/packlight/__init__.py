"""Packlight: disaggregated prefill/decode LLM serving that ships only the KV cache that matters."""

__version__ = "0.1.0"
