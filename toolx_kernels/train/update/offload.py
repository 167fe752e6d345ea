"""Offloaded AdamW: optimizer state and gradient sums in CPU memory; the GPU holds weights and gradients in transit."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from toolx_kernels.reference import compute_dtype
from toolx_kernels.train.config import UpdateSettings
from toolx_kernels.train.update.optimizer import Optimizer, moments

BUFFERS = 4
BUFFER_BYTES = 32 << 20
STAGING_BYTES = BUFFERS * BUFFER_BYTES  # page-locked


class OffloadedAdamW(Optimizer):
    """torch's fused AdamW on the CPU, which also holds masters, moments and gradient sums, all in fp32.

    A gradient leaves the GPU as soon as backward has completed it, while backward continues. The input embedding's
    leaves in ``collect``, because its rows are written after autograd has finished its share of a tied weight. An
    updated weight returns while the next one is computed. If the model is on the CPU, the same happens there.
    """

    def __init__(self, model: PreTrainedModel, args: UpdateSettings, learning_rate: float):
        super().__init__(model, args, learning_rate)
        self._sums: dict[str, Tensor] = {}
        self._transfer = Transfer(self.device)
        embedding = model.get_input_embeddings().weight
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._leave, name))
            for name, parameter in self.parameters.items()
            if parameter is not embedding
        ]

    def collect(self) -> None:
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                self._leave(name, parameter)

    def drop_gradients(self) -> None:
        super().drop_gradients()
        self._transfer.wait()
        self._sums.clear()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        super().close()
        self._transfer.close()

    @torch.no_grad()
    def _leave(self, name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        begun = name in self._sums
        if not begun:
            self._sums[name] = torch.empty(gradient.shape, dtype=compute_dtype(gradient))
        self._transfer.fetch(gradient, self._sums[name], torch.Tensor.add_ if begun else torch.Tensor.copy_)

    def _take(self) -> dict[str, Tensor]:
        self.collect()
        self._transfer.wait()
        sums, self._sums = self._sums, {}
        return {name: sums.pop(name) for name in self.parameters if name in sums}

    def _updating(self, seed: tuple[int, int]):
        return self._transfer.delivering()

    def _prepare(self, name: str) -> None:
        parameter = self.parameters[name]
        state, dtype = self.base.state[parameter], compute_dtype(parameter)
        if not state:
            cpu = torch.device("cpu")
            state |= moments(parameter, dtype, cpu)
            state["master"] = parameter.detach().to(cpu, dtype, copy=True)

    def _update(self, name: str, gradient: Tensor, clip: Tensor) -> None:
        state = self.base.state[self.parameters[name]]
        weight = state["master"]
        self._fused_adamw(weight, gradient.mul_(clip), state["exp_avg"], state["exp_avg_sq"], state["step"])
        self._transfer.deliver(weight, self.parameters[name].detach())


class Transfer:
    """Moves tensors between ``device`` and CPU memory through a few page-locked buffers and, on a GPU, a side stream.

    Only the buffers are page-locked: their contents are cast or added up on the CPU anyway, and locking the states of a
    large model would take up to twice their memory. A single thread empties the buffers in the order of the calls, so
    sums do not depend on thread timing.
    """

    def __init__(self, device: torch.device, buffer_bytes: int = BUFFER_BYTES):
        on_card = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_card else None
        self._bytes = buffer_bytes
        self._free: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put(torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=on_card))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="toolx-offload")
        self._pending: deque[Future] = deque()

    def fetch(self, source: Tensor, target: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Runs ``combine(target, source)`` for a source on the device and a target on the CPU; done after ``wait``."""
        self._follow()
        for piece, place in self._pieces(source, target, source.itemsize):
            buffer = self._free.get()
            arriving = buffer[: piece.nbytes].view(piece.dtype)
            with torch.cuda.stream(self._stream):
                arriving.copy_(piece, non_blocking=True)
            self._then(buffer, partial(combine, place, arriving))
        if self._stream is not None:
            source.record_stream(self._stream)

    @contextmanager
    def delivering(self) -> Iterator[None]:
        """Context for ``deliver``: writes happen after all earlier and before all later work on the device."""
        self._follow()
        try:
            yield
        finally:
            self.wait()
            if self._stream is not None:
                torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def deliver(self, source: Tensor, target: Tensor) -> None:
        """Runs ``target.copy_(source)`` for a source on the CPU and a target on the device, inside ``delivering``."""
        for piece, place in self._pieces(source, target, target.itemsize):
            buffer = self._free.get()
            leaving = buffer[: place.nbytes].view(place.dtype).copy_(piece)
            with torch.cuda.stream(self._stream):
                place.copy_(leaving, non_blocking=True)
            self._then(buffer)

    def wait(self) -> None:
        """Waits for all pending transfers; raises their errors."""
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        self._thread.shutdown()

    def _follow(self) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def _pieces(self, source: Tensor, target: Tensor, itemsize: int) -> Iterator[tuple[Tensor, Tensor]]:
        size = self._bytes // itemsize
        return zip(source.reshape(-1).split(size), target.view(-1).split(size), strict=True)

    def _then(self, buffer: Tensor, work: Callable[[], object] = lambda: None) -> None:
        """Schedules ``work()`` for when the copy just started is complete, then frees the buffer."""
        copied = self._stream.record_event() if self._stream is not None else None

        def finish():
            try:
                if copied is not None:
                    copied.synchronize()
                work()
            finally:
                self._free.put(buffer)

        while self._pending and self._pending[0].done():
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(finish))
