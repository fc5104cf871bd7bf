"""KV memory: page books (ints), the radix cache of exact KV (ints), and the pool (tensors)."""
