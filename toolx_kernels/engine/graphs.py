"""CUDA graphs of decode steps: captured when sizes come back, kept until what is baked into them changes."""

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
CAPTURED_AT_USE = 3  # of its sizes; before, a step runs eagerly, which takes as long as five replays

Replay = Callable[[Tensor], Tensor]  # of a step: takes its packed inputs to its results


class Graphs:
    """The graphs of a runner, by the sizes of a step and the sampling parameters.

    A graph repeats what was captured, whatever has changed since: so all that a step reads comes in one buffer, and
    all graphs go when the memory that they read has moved. A capture takes as long as ten replays or more.

    ``capture`` makes a replayable function of a step, the buffer that it reads, a memory pool for graphs and the stream
    to capture on; None runs every step eagerly.
    """

    def __init__(self, capture: Callable[..., Replay] | None, device: torch.device):
        self.capture, self.device = capture, device
        self.in_use = False  # in this call
        self._graphs: dict[tuple, Replay] = {}  # the one used last stands last
        self._uses: Counter[tuple] = Counter()  # of the sizes that graphs are kept for
        self._baked: tuple = ()
        self._memory: Any = None
        self._stream = torch.cuda.Stream(device) if capture and device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self._graphs)

    def start(self, params: SamplingParams, weights: Fingerprint, pool: PagePool) -> None:
        """Before the steps of a call: drops graphs that read what has moved, and decides whether there are any."""
        if self.capture is None:
            self.in_use = False
            return
        self._params = (params.temperature, params.top_k, params.top_p, params.min_p)
        self._made_room = False
        baked = (weights.settings, weights.places, tuple(c.data_ptr() for c in (*pool.key_caches, *pool.value_caches)))
        if baked != self._baked:
            self._graphs.clear()
            self._baked = baked
            # a pool that all graphs have left cannot be captured into again
            self._memory = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        # Hooks are Python, which a graph does not repeat; and attention without a kernel waits for the device.
        hooks = weights.hooks or torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
        cache = pool.key_caches[0]
        self.in_use = has_kernel(cache.dtype, cache.shape[-1]) and not hooks

    def graph_of(self, step: Callable[[Tensor, Sizes], Tensor], sizes: Sizes, packed: Tensor) -> Replay | None:
        """The graph of ``step`` in these sizes, captured with ``packed`` in the buffer; None: run this one eagerly."""
        if not self.in_use or self.capture is None:
            return None
        key = (sizes, self._params)
        graph = self._graphs.pop(key, None)
        if graph is None:
            self._uses[key] += 1
            if self._uses[key] < CAPTURED_AT_USE:
                return None
            if not self._made_room:  # within a capture the allocator cannot give back what it has cached
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
    """A function that copies a pinned tensor over ``buffer`` and repeats ``step(buffer)`` as a CUDA graph.

    All graphs work in the same ``memory``, so a result must be read before any of them runs again; and all are
    captured on the same ``stream``, for each of which cuBLAS keeps a workspace (32 MiB on Hopper). Raises RuntimeError,
    before a capture begins, where the step waits for the device.
    """
    stream.wait_stream(torch.cuda.current_stream())
    waiting = torch.cuda.get_sync_debug_mode()
    try:
        with torch.cuda.stream(stream):
            # One eager pass leaves nothing to a capture that it may not do: Triton compiles and loads the kernels of
            # these sizes, cuBLAS loads its own and makes the workspace of this stream. A second would find all done.
            torch.cuda.set_sync_debug_mode("error")
            try:
                step(buffer)
            finally:
                torch.cuda.set_sync_debug_mode(waiting)
            graph = torch.cuda.CUDAGraph()
            # Not by torch.cuda.graph, which empties the caches of device and pinned memory every time. Other threads
            # may go on calling CUDA.
            graph.capture_begin(pool=memory, capture_error_mode="thread_local")
            try:
                result = step(buffer)
            finally:
                graph.capture_end()
    finally:  # or what failed would go on beside the eager step that follows
        torch.cuda.current_stream().wait_stream(stream)

    def replay(flat: Tensor) -> Tensor:
        buffer.copy_(flat, non_blocking=True)
        graph.replay()
        return result

    return replay
