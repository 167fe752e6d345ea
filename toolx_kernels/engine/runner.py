"""The runner: the model on pages; prefill of chunks, and the decode step, which on a GPU is one CUDA graph.

A step reads all its inputs from one buffer, in sizes rounded up to a few buckets. The rows that pad a bucket write
nothing, see one token of page 0, and their samples are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from toolx_kernels.engine.fingerprint import Fingerprint
from toolx_kernels.engine.graphs import Graphs, Replay
from toolx_kernels.engine.pages import PagePool, on_device
from toolx_kernels.engine.scheduler import Chunk
from toolx_kernels.engine.step_inputs import DecodeInputs, Sizes, bucket, buffer_length, pack, parts_of
from toolx_kernels.engine.types import SamplingParams
from toolx_kernels.models.bridge import head_of, run_body
from toolx_kernels.ops.attention.paged import PagedContext
from toolx_kernels.ops.lm_head.sampling import sample

# Tokens in one forward pass, by device: a limit on the activations. With few tokens, a GPU computes a layer faster than
# the host launches the next one.
MAX_PREFILL_TOKENS = {"cpu": 4096, "cuda": 16384}
LEAST_PREFILL_TOKENS = 64  # with fewer, activations are no longer most of a forward pass's memory


class Runner:
    """Runs ``model`` on the pages of ``pool``; to be used inside ``toolx_attention(model)``.

    Args:
        capture: see ``Graphs``.
        compile: decode through ``torch.compile``, which fuses the operations between matrix products and attention.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pool: PagePool,
        capture: Callable[..., Replay] | None = None,
        compile: bool = False,
    ):
        self.model, self.pool = model, pool
        self._body = torch.compile(run_body, dynamic=True) if compile else run_body
        self.device = pool.key_caches[0].device
        self.prefill_tokens = MAX_PREFILL_TOKENS[self.device.type]
        self.graphs = Graphs(capture, self.device)
        self._packed_sizes: Sizes | None = None  # of the buffer that the steps' inputs are packed into

    def start(self, params: SamplingParams, weights: Fingerprint) -> None:
        """To be called before the steps of a call, whose parameters and weights do not change."""
        self.params, self.head = params, head_of(self.model)
        self.graphs.start(params, weights, self.pool)

    # ---- prefill

    def prefill(self, chunks: Sequence[Chunk]) -> Tensor:
        """Writes the chunks' keys and values; returns the hidden state of each chunk's last token, (chunks, D)."""
        last = []
        for batch in _batches(chunks, self.prefill_tokens):
            hidden = self._prefill(batch)
            ends = np.cumsum([stop - start for _, start, stop in batch]) - 1
            done = np.array([stop == len(chunk.tokens) for chunk, _, stop in batch])
            last.append(hidden[self._tensor(ends[done])])
        return torch.cat(last)

    def halve_prefill(self) -> bool:
        """Halves the tokens of a forward pass from now on; returns False if it cannot be shorter."""
        if self.prefill_tokens <= LEAST_PREFILL_TOKENS:
            return False
        self.prefill_tokens //= 2
        return True

    def _prefill(self, batch: list[tuple[Chunk, int, int]]) -> Tensor:
        lengths = [stop - start for _, start, stop in batch]
        positions = np.concatenate([np.arange(start, stop) for _, start, stop in batch])
        table = np.zeros((len(batch), max(len(chunk.pages) for chunk, _, _ in batch)), dtype=np.int64)
        for row, (chunk, _, _) in enumerate(batch):
            table[row, : len(chunk.pages)] = chunk.pages
        size = self.pool.page_size
        slots = table[np.repeat(np.arange(len(batch)), lengths), positions // size] * size + positions % size
        context = PagedContext(
            self.pool.key_caches,
            self.pool.value_caches,
            slots=self._tensor(slots),
            block_table=self._tensor(table.astype(np.int32)),
            seq_lens=self._tensor(np.array([stop for _, _, stop in batch], dtype=np.int32)),
            cu_seqlens_q=self._tensor(np.cumsum([0, *lengths], dtype=np.int32)),
            max_queries=max(lengths),
        )
        ids = np.concatenate([chunk.tokens[start:stop] for chunk, start, stop in batch])
        return run_body(self.model, self._tensor(ids), self._tensor(positions), context)

    # ---- decoding

    def decode(self, inputs: DecodeInputs) -> tuple[np.ndarray, np.ndarray]:
        """Computes the next tokens of the rows, (R), and their statistics, (R, 4): one step of the whole batch."""
        exact = Sizes.of(inputs)
        sizes = bucket(exact)
        if not self.graphs.in_use:
            sizes = exact._replace(siblings=sizes.siblings)  # which torch.compile treats as a constant
        if sizes != self._packed_sizes:
            pinned = self.device.type == "cuda"
            self._packed = torch.zeros(buffer_length(sizes), dtype=torch.int64, device="cpu", pin_memory=pinned)
            self._parts, self._packed_sizes = parts_of(self._packed.numpy(), sizes), sizes
        pack(inputs, self._parts)  # safe to overwrite: the result of the previous step has been read
        graph = self.graphs.graph_of(self._step, sizes, self._packed)
        if graph:
            return _as_numpy(graph(self._packed), exact.rows)
        return _as_numpy(self._step(self._packed.to(self.device, non_blocking=True), sizes), exact.rows)

    def sample(self, hidden: Tensor, chunk_of: Sequence[int], streams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Samples tokens (R), with statistics (R, 4), for rows that continue ``hidden[chunk_of]`` of (chunks, D)."""
        of_row = hidden[self._tensor(np.array(chunk_of))]
        return _as_numpy(self._sample(of_row, self._tensor(streams)), len(streams))

    def _step(self, buffer: Tensor, sizes: Sizes) -> Tensor:
        """Tokens and statistics, (5, rows) float64. Neither waits for the device nor reads host memory."""
        step = parts_of(buffer, sizes)
        context = PagedContext(
            self.pool.key_caches,
            self.pool.value_caches,
            slots=step.slots,
            block_table=step.block_table,
            seq_lens=step.seq_lens,
            cu_seqlens_q=step.cu_rows,
            cu_groups=step.cu_groups,
            prefix_lens=step.prefix_lens,
            max_queries=sizes.siblings,
        )
        return self._sample(self._body(self.model, step.ids, step.positions, context), step.streams)

    def _sample(self, hidden: Tensor, streams: Tensor) -> Tensor:
        p = self.params
        drawn = sample(
            hidden, streams=streams, temperature=p.temperature, top_k=p.top_k, top_p=p.top_p, min_p=p.min_p, **self.head
        )
        columns = (drawn.tokens, drawn.logprobs, drawn.lse, drawn.entropy, drawn.kept_mass)
        return torch.stack([column.double() for column in columns])

    def _tensor(self, array: np.ndarray) -> Tensor:
        return on_device(array, self.device)


def _batches(chunks: Sequence[Chunk], n_tokens: int) -> Iterator[list[tuple[Chunk, int, int]]]:
    """Yields lists of (chunk, start, stop) with at most ``n_tokens`` tokens each; a chunk may be cut anywhere."""
    batch, room = [], n_tokens
    for chunk in chunks:
        start = chunk.start
        while start < len(chunk.tokens):
            stop = min(len(chunk.tokens), start + room)
            batch.append((chunk, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield batch
                batch, room = [], n_tokens
    if batch:
        yield batch


def _as_numpy(result: Tensor, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
    tokens, *stats = result.cpu().numpy()[:, :n_rows]  # copied whole: slicing first would launch a kernel
    return tokens.astype(np.int64), np.stack(stats).T
