"""The decode process: packed KV and continuous batching."""
