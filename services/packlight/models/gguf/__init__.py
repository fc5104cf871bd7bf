"""GGUF files: reading them, and turning one into a folder in Hugging Face layout, once."""
