"""Cases of the loss benchmark: one on-policy GRPO update of the LM head.

N tokens of B completions of equal length, with given advantages.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from bench.common.tables import DTYPES

# Spread of the logits: entropies of a few nats, as in a trained model. On flat logits all probabilities would be below
# the threshold at which cut-cross-entropy skips work, so its time would not include that work.
LOGIT_STD = 4.0


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the benchmark. ``what`` is forward, backward or both; ``dead`` the share of rows without gradient."""

    what: str
    n: int
    d: int
    v: int
    dtype: str = "bfloat16"
    dead: float = 0.0
    frozen: bool = False

    def __str__(self) -> str:
        head = "frozen" if self.frozen else "trained"
        return f"{self.what}-N{self.n}-D{self.d}-V{self.v}-{DTYPES[self.dtype]}-dead{self.dead:.0%}-{head}"


@dataclass(frozen=True, slots=True)
class Problem:
    """The tensors on which every provider runs."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D); a frozen head does not require grad
    targets: Tensor  # (N) int64, sampled from the head
    advantages: Tensor  # (B) fp32, zero for dead completions
    cu_seqlens: Tensor  # (B + 1) int32

    def gradient_bytes(self) -> int:
        """Bytes of the gradients, and of an fp32 accumulator of the weight's gradient where that is not fp32 itself."""
        total = self.hidden.nbytes
        if self.weight.requires_grad:
            total += self.weight.nbytes + (4 * self.weight.numel() if self.weight.itemsize < 4 else 0)
        return total

    def forget_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None


@lru_cache(maxsize=1)
def _tensors(n: int, d: int, vocab: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(n, d, generator=g, device=device).to(dtype)
    weight = (torch.randn(vocab, d, generator=g, device=device) * (LOGIT_STD / d**0.5)).to(dtype)
    targets = [
        torch.multinomial((rows @ weight.T).float().softmax(-1), 1, generator=g).squeeze(1)
        for rows in hidden.split(max(1, 2**25 // vocab))
    ]
    return hidden, weight, torch.cat(targets)


def make_problem(
    n: int,
    d: int,
    vocab: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    dead: float = 0.0,
    frozen: bool = False,
) -> Problem:
    """Random tensors of one shape, the same on every call.

    ``dead`` is the share of completions with advantage 0, rounded to whole ones (of at least 16) at random positions.
    """
    hidden, weight, targets = _tensors(n, d, vocab, dtype, torch.device(device))
    b = max(16, n // 1024)
    g = torch.Generator().manual_seed(1)
    advantages = torch.randn(b, generator=g)
    advantages[torch.randperm(b, generator=g)[: round(dead * b)]] = 0
    return Problem(
        hidden.detach().requires_grad_(),
        weight.detach().requires_grad_(not frozen),
        targets,
        advantages.to(device),
        torch.arange(0, n + 1, n // b, dtype=torch.int32, device=device),
    )
