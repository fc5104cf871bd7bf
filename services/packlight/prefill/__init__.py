"""The prefill process: exact KV, prefix cache, selection and shipping."""
