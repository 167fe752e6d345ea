"""Sampling of the next token from hidden states and the LM head, with the statistics that the loss needs later.

    z = softcap(h W^T + bias) / T        token = argmax_v z_v + Gumbel noise(stream, v)

Without filters it takes one sweep over the vocabulary, and no logits (R, V) exist: the sweep tracks the largest
``z + noise`` together with the sums of exponentials. With top-k, top-p or min-p, logits are held for as many rows at a
time as fit a bounded workspace.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toolx_kernels import reference
from toolx_kernels.errors import InputError
from toolx_kernels.ops import library
from toolx_kernels.ops.lm_head import sampling_torch, tiles
from toolx_kernels.ops.lm_head.checks import check_devices, check_head, check_tensors
from toolx_kernels.ops.lm_head.head import as_given, blocks
from toolx_kernels.reference import Sample, compute_dtype
from toolx_kernels.settings import SHARE, TEMPERATURE, TOP_K, TOP_P, check_number

TOP_P_CANDIDATES = 512
FILTER_BYTES = 64  # of workspace per logit, measured: logit, sorted logit, index, probabilities, sums and masks


def sample(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    streams: Tensor,  # (R, 5) int64: seed, step, row id, rollout index, position
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    bias: Tensor | None = None,  # (V)
    softcap: float | None = None,
) -> Sample:
    """Samples one token per row, with its log-prob, lse, entropy and the probability mass that the filters kept.

    Randomness is counter-based (``reference.gumbel_noise``): a token is a function of its stream and its
    distribution alone, independent of the rest of the batch. Temperature 0 is greedy, with log-probs at temperature 1;
    among equal candidates the lowest id wins. Filters are those of ``reference.filter_logits``: top-k, then top-p, then
    min-p, each applied to the result of the one before.

    Logits are accumulated in fp32 for inputs in bf16, fp16 or fp32, and in float64 for float64; the compiled CPU kernel
    gives a row the same bits whatever the other rows are. A logit of -inf excludes its token. A row with a NaN or +inf
    among its logits, or with only -inf, gets a log-prob of NaN and a meaningless token that is still a valid id.

    Raises:
        InputError: shapes, dtypes or devices that do not fit together, or a setting out of range.
    """
    check_head(hidden, weight, bias, softcap)
    check_tensors(streams=streams)
    if streams.ndim != 2 or streams.shape[1] != 5 or streams.dtype != torch.int64 or len(streams) != len(hidden):
        raise InputError(
            f"streams {tuple(streams.shape)} of {streams.dtype} must be int64 (R, 5), one row for each of the "
            f"{len(hidden)} rows of hidden."
        )
    check_devices(hidden.device, streams=streams)
    if len(weight) == 0:
        raise InputError("weight has no rows: there must be a token to sample.")
    temperature = check_number("temperature", temperature, TEMPERATURE, whole=False)
    top_k = check_number("top_k", top_k, TOP_K)
    top_p = check_number("top_p", top_p, TOP_P, whole=False)
    min_p = check_number("min_p", min_p, SHARE, whole=False)
    outputs = torch.ops.toolx.sample(
        hidden, weight, streams, temperature, top_k, top_p, min_p, bias, float(softcap or 0)
    )
    return Sample(*outputs)


@as_given
def _sample(hidden, weight, streams, temperature, top_k, top_p, min_p, bias, softcap) -> tuple[Tensor, ...]:
    dtype, vocab_size = compute_dtype(hidden), len(weight)
    weight = weight if weight.stride(1) == 1 or hidden.device.type != "cpu" else weight.contiguous()
    hidden = hidden.to(dtype).contiguous() if hidden.device.type == "cpu" else hidden
    streams = streams.contiguous() if temperature else None
    head = weight, temperature or 1.0, None if bias is None else bias.to(dtype).contiguous(), softcap
    tokens = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device)
    stats = torch.empty(3, len(hidden), dtype=dtype, device=hidden.device)
    kept_mass = torch.ones_like(stats[0])
    if 0 < top_k < vocab_size or top_p < 1 or min_p > 0:
        _draw_filtered(hidden, streams, head, (top_k, top_p, min_p), tokens, stats, kept_mass)
    else:
        _sweep(hidden, streams, head, tokens, stats)
    return tokens, *(row.clone() for row in stats), kept_mass  # an operator's results share no memory


def kernels(dtype: torch.dtype):
    """The module with ``sample_sweep`` and ``add_gumbel`` for sums in this dtype."""
    return torch.ops.toolx if dtype == torch.float32 else sampling_torch


def _sweep(hidden, streams, head, tokens, stats, logits=None) -> None:
    weight, temperature, bias, softcap = head
    kernels(stats.dtype).sample_sweep(hidden, weight, streams, temperature, bias, softcap, tokens, stats, logits)


def _draw_filtered(hidden, streams, head, filters, tokens, stats, kept_mass) -> None:
    """Writes the results of ``sample`` with filters, some rows at a time in a bounded workspace."""
    vocab_size, on_cpu = len(head[0]), hidden.device.type == "cpu"
    budget = tiles.default_workspace_bytes(hidden.device)
    rows_at_once = max(1, budget * 4 // (FILTER_BYTES * vocab_size * stats.itemsize))
    for rows in blocks(len(hidden), rows_at_once):
        n = rows.stop - rows.start
        # on a GPU torch reduces a single row in a run-dependent order, so the row is duplicated
        logits = stats.new_zeros(max(n, 1 if on_cpu else 2), vocab_size)
        part = stats.new_empty(3, n)
        _sweep(hidden[rows], None, head, tokens[rows], part, logits[:n])
        kept = filter_logits(logits, *filters)[:n]
        kept_mass[rows] = (kept.logsumexp(-1) - part[1]).exp()
        if streams is not None:
            kept = kept.clone() if kept.data_ptr() == logits.data_ptr() else kept
            kernels(stats.dtype).add_gumbel(kept, streams[rows])
        chosen = kept.argmax(-1)
        part[0] = logits[:n].gather(-1, chosen[:, None]).squeeze(-1) - part[1]
        tokens[rows], stats[:, rows] = chosen, part


def filter_logits(logits: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """``reference.filter_logits``. On a CPU, where sorting the vocabulary would take most of the time, top-p uses only
    the largest logits if they hold enough of the probability in all rows."""
    if top_p < 1 and logits.device.type == "cpu":
        logits = reference.filter_logits(logits, top_k, 1.0, 0.0)
        top_k = 0
        largest = logits.topk(min(TOP_P_CANDIDATES, logits.shape[1])).values
        probs = (largest - logits.logsumexp(-1, keepdim=True)).exp()
        inside = (probs.cumsum(-1) - probs) < top_p
        if probs.isfinite().all() and not inside[:, -1].any():
            inside[:, 0] = True
            bound = largest.masked_fill(~inside, torch.inf).amin(-1, keepdim=True)
            logits = logits.masked_fill(logits < bound, -torch.inf)
            top_p = 1.0
    return reference.filter_logits(logits, top_k, top_p, min_p)


def _on_gpu(name: str):
    """A function of ``sampling_triton``, imported when it is first called: triton may be absent."""

    def launch(*arguments) -> None:
        from toolx_kernels.ops.lm_head import sampling_triton

        getattr(sampling_triton, name)(*arguments)

    return launch


def _fake(hidden, weight, streams, *_):
    stats = [hidden.new_empty(hidden.shape[:1], dtype=compute_dtype(hidden)) for _ in range(4)]
    return streams.new_empty(hidden.shape[:1]), *stats


library.define(
    "sample(Tensor hidden, Tensor weight, Tensor streams, float temperature, int top_k, float top_p, float min_p, "
    "Tensor? bias, float softcap) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    default=_sample,
    fake=_fake,
    triton=_sample,
)
library.define(
    "sample_sweep(Tensor hidden, Tensor weight, Tensor? streams, float temperature, Tensor? bias, float softcap, "
    "Tensor(a!) tokens, Tensor(b!) stats, Tensor(c!)? logits) -> ()",
    default=sampling_torch.sample_sweep,
    fake=lambda *_: None,
    triton=_on_gpu("sample_sweep"),
)
library.define(
    "add_gumbel(Tensor(a!) logits, Tensor streams) -> ()",
    default=sampling_torch.add_gumbel,
    fake=lambda logits, streams: None,
    triton=_on_gpu("add_gumbel"),
)
