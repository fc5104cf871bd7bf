"""Running a model over pages: batches, the runner, the sampler, the fake model."""
