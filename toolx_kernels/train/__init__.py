"""Training: the loop, sampling, learning, and the storage and report of a run."""
