"""A pytest plugin: rollouts run without CUDA graphs. ``pytest -p bench.gpu.eager``."""

from toolx_kernels.rollout import engine

engine.capture_cuda_graph = None
