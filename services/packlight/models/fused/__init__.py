"""The fused lane: Llama-like models without `transformers`, in as few passes over memory as they allow."""
