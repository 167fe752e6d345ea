"""CUDA graphs of decode steps: captured when sizes recur, kept until the addresses or settings in them change."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module

from toolx_kernels.engine.fingerprint import Fingerprint
from toolx_kernels.engine.pages import PagePool
from toolx_kernels.engine.step_inputs import Sizes
from toolx_kernels.engine.types import SamplingParams
from toolx_kernels.ops.attention.paged import has_kernel

MAX_GRAPHS = 64  # kept at a time
CAPTURED_AT_USE = 3  # of its sizes; earlier steps run eagerly, which takes as long as five replays

Replay = Callable[[Tensor], Tensor]  # of a step: its packed inputs -> its results


class Graphs:
    """The graphs of a runner, by the sizes of a step and the sampling parameters.

    A graph repeats exactly what was captured. So a step reads all its inputs from one buffer, and all graphs are
    dropped when the memory that they read has moved. A capture takes at least as long as ten replays.

    ``capture(step, buffer, memory pool, stream)`` returns a replayable function of a step, such as
    ``capture_cuda_graph``; None runs every step eagerly.
    """

    def __init__(self, capture: Callable[..., Replay] | None, device: torch.device):
        self.capture, self.device = capture, device
        self.in_use = False  # in this call
        self._graphs: dict[tuple, Replay] = {}  # the most recently used is last
        self._uses: Counter[tuple] = Counter()  # of each key
        self._baked: tuple = ()
        self._memory: Any = None
        self._stream = torch.cuda.Stream(device) if capture and device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self._graphs)

    def start(self, params: SamplingParams, weights: Fingerprint, pool: PagePool) -> None:
        """To be called before the steps of a call: drops graphs that read moved memory, and sets ``in_use``."""
        if self.capture is None:
            self.in_use = False
            return
        self._params = (params.temperature, params.top_k, params.top_p, params.min_p)
        self._made_room = False
        baked = (weights.settings, weights.places, tuple(c.data_ptr() for c in (*pool.key_caches, *pool.value_caches)))
        if baked != self._baked:
            self._graphs.clear()
            self._baked = baked
            # a pool whose graphs are all gone cannot be captured into again
            self._memory = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        # A graph does not repeat hooks, which are Python; and attention without a kernel waits for the device.
        hooks = weights.hooks or torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
        cache = pool.key_caches[0]
        self.in_use = has_kernel(cache.dtype, cache.shape[-1]) and not hooks

    def graph_of(self, step: Callable[[Tensor, Sizes], Tensor], sizes: Sizes, packed: Tensor) -> Replay | None:
        """The graph of ``step`` for these sizes, captured with ``packed`` in the buffer; None: run the step eagerly."""
        if not self.in_use or self.capture is None:
            return None
        key = (sizes, self._params)
        graph = self._graphs.pop(key, None)
        if graph is None:
            self._uses[key] += 1
            if self._uses[key] < CAPTURED_AT_USE:
                return None
            if not self._made_room:  # during a capture the allocator cannot release cached memory
                torch.cuda.empty_cache()
                self._made_room = True
            buffer = packed.to(self.device, non_blocking=True)
            try:
                graph = self.capture(lambda inputs: step(inputs, sizes), buffer, self._memory, self._stream)
            except RuntimeError as error:
                warnings.warn(f"Decoding runs without CUDA graphs, because capturing one failed: {error}", stacklevel=2)
                self.capture, self.in_use = None, False
                return None
            if len(self._graphs) == MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
        self._graphs[key] = graph
        return graph


def capture_cuda_graph(
    step: Callable[[Tensor], Tensor], buffer: Tensor, memory: Any, stream: torch.cuda.Stream
) -> Replay:
    """Returns a function that copies a pinned tensor to ``buffer`` and replays ``step(buffer)`` as a CUDA graph.

    All graphs share the same ``memory``, so a result must be read before any of them runs again. All are captured on
    the same ``stream``, because cuBLAS keeps a workspace per stream (32 MiB on Hopper).

    Raises:
        RuntimeError: the step waits for the device; raised before the capture begins.
    """
    stream.wait_stream(torch.cuda.current_stream())
    waiting = torch.cuda.get_sync_debug_mode()
    try:
        with torch.cuda.stream(stream):
            # One eager pass does all that is not allowed in a capture: Triton compiles and loads the kernels of these
            # sizes, cuBLAS loads its kernels and allocates the workspace of this stream. A second pass is not needed.
            torch.cuda.set_sync_debug_mode("error")
            try:
                step(buffer)
            finally:
                torch.cuda.set_sync_debug_mode(waiting)
            graph = torch.cuda.CUDAGraph()
            # Not torch.cuda.graph, which empties the caches of device and pinned memory every time. With thread_local,
            # other threads may call CUDA meanwhile.
            graph.capture_begin(pool=memory, capture_error_mode="thread_local")
            try:
                result = step(buffer)
            finally:
                graph.capture_end()
    finally:  # else a failed step could still run during the eager step that follows
        torch.cuda.current_stream().wait_stream(stream)

    def replay(flat: Tensor) -> Tensor:
        buffer.copy_(flat, non_blocking=True)
        graph.replay()
        return result

    return replay
