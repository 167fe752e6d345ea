"""The trainer: config, data, hard sampling, packing, the loop, checkpoints."""
