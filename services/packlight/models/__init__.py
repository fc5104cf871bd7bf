"""Loading models and tokenizers, and the adapter onto the transformers attention interface."""
