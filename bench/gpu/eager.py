"""Eager rollouts, without CUDA graphs: a pytest plugin for ``pytest -p bench.gpu.eager``."""

from toolx_kernels.engine import engine

engine.capture_cuda_graph = None
