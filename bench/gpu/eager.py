"""A pytest plugin: rollouts run without CUDA graphs. ``pytest -p bench.gpu.eager``."""

from toolx_kernels.engine import engine

engine.capture_cuda_graph = None
