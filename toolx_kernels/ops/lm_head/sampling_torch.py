"""The sampling sweep in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from toolx_kernels import reference
from toolx_kernels.ops.lm_head.head import blocks, pick
from toolx_kernels.ops.lm_head.sweep_torch import LOG_OF_NOTHING

TORCH_COLUMNS = 2048  # width of a vocabulary tile; a multiple of 4, the words of one Philox block


def sample_sweep(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    streams: Tensor | None,  # (R, 5) int64, or None for no noise
    temperature: float,
    bias: Tensor | None,  # (V)
    softcap: float,
    tokens: Tensor,  # (R) int64, written
    stats: Tensor,  # (3, R) written: the token's log-prob, lse and entropy
    logits: Tensor | None,  # (R, V) written if given
) -> None:
    """Writes the token with the largest ``z + noise`` and its statistics; stats and logits in the dtype of the sums."""
    top = torch.full_like(stats[0], torch.finfo(stats.dtype).min)
    total, moment = torch.zeros_like(stats[:2])
    best = torch.full_like(top, -torch.inf)
    chosen = torch.full_like(top, -torch.inf)
    tokens.zero_()
    for columns in blocks(len(weight), TORCH_COLUMNS):
        z = reference.linear_logits(hidden, weight[columns], temperature, pick(bias, columns), softcap)
        if logits is not None:
            logits[:, columns] = z
        score = z
        if streams is not None:
            score = z + reference.gumbel_noise(streams, z.shape[1], columns.start).to(z.dtype)
        at = score.argmax(1, keepdim=True)
        value = score.gather(1, at).squeeze(1)
        better = value > best
        best = torch.where(better, value, best)
        chosen = torch.where(better, z.gather(1, at).squeeze(1), chosen)
        tokens.copy_(torch.where(better, at.squeeze(1) + columns.start, tokens))
        new_top = torch.maximum(top, z.amax(1))
        shift = (top - new_top).clamp_(min=LOG_OF_NOTHING)
        d = (z - new_top[:, None]).clamp_(min=LOG_OF_NOTHING)
        exp = d.exp()
        moment = shift.exp() * (moment + shift * total) + torch.linalg.vecdot(exp, d)
        total = shift.exp() * total + exp.sum(1)
        top = new_top
    log_total = total.log()
    stats[0] = chosen - top - log_total
    stats[1] = top + log_total
    stats[2] = log_total - moment / total


def add_gumbel(logits: Tensor, streams: Tensor) -> None:
    """Adds the noise of streams (R, 5) to logits (R, V) in place."""
    for columns in blocks(logits.shape[1], TORCH_COLUMNS):
        logits[:, columns] += reference.gumbel_noise(streams, columns.stop - columns.start, columns.start)
