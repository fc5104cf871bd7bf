"""The FlashInfer backend: attention on GPUs, over the same head pages as everywhere else."""
