"""Providers of the loss: ours, plain torch, the bare GEMMs, and other projects' fused losses, on the same tensors.

A peer that only computes log-probs or cross-entropy gets the objective from ``grpo``, so its upstream gradient is the
same vector that the fused losses compute. Peers run with their defaults unless a comment says why not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common.absent import Absent
from bench.loss.cases import Problem
from toolx_kernels import linear_grpo_loss, linear_logprob


def grpo(logprobs: Tensor, p: Problem) -> Tensor:
    """The clipped on-policy objective on (N) log-probs; completions are equally long, so one mean is enough."""
    advantages = p.advantages.repeat_interleave(len(logprobs) // len(p.advantages))
    ratio = (logprobs - logprobs.detach()).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


class LossProvider:
    """Log-probs, and a loss whose backward pass fills ``hidden.grad`` and ``weight.grad``."""

    name: str
    package: str | None = None  # what to install
    passes = ("forward", "backward", "both")

    def __init__(self, device: torch.device):
        """Imports what the provider needs. Raises Absent or ImportError."""

    def logprobs(self, p: Problem) -> Tensor:
        raise NotImplementedError

    def loss(self, p: Problem) -> Tensor:
        return grpo(self.logprobs(p), p)

    def stage(self, what: str, p: Problem) -> Callable[[], object]:
        """Prepares one call of a pass; the returned function is timed."""
        p.forget_gradients()
        if what == "forward":
            inputs = replace(p, hidden=p.hidden.detach(), weight=p.weight.detach())
            return torch.no_grad()(lambda: self.logprobs(inputs))
        if what == "backward":
            return self.loss(p).backward
        return lambda: self.loss(p).backward()


class Toolx(LossProvider):
    name = "toolx"

    def logprobs(self, p):
        return linear_logprob(p.hidden, p.weight, p.targets).logprobs

    def loss(self, p):
        out = linear_grpo_loss(p.hidden, p.weight, p.targets, cu_seqlens=p.cu_seqlens, advantages=p.advantages)
        return out.loss


class PlainTorch(LossProvider):
    name = "plain torch"

    def logprobs(self, p):
        logits = (p.hidden @ p.weight.T).float()
        return logits.gather(1, p.targets[:, None]).squeeze(1) - logits.logsumexp(1)


class Floor(LossProvider):
    """The GEMMs that every exact method needs, into memory that is already allocated."""

    name = "floor"

    def rows(self, p: Problem) -> Tensor:
        return p.hidden.detach()

    def stage(self, what, p):
        hidden, weight, head = self.rows(p), p.weight.detach(), p.weight.requires_grad
        wide = hidden.is_cuda and hidden.dtype != torch.float32
        z = hidden.new_zeros(len(hidden), len(weight))
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32 if wide else None) if head else None

        def forward():
            torch.mm(hidden, weight.T, out=z)

        def backward():
            torch.mm(z, weight, out=grad_hidden)
            if head:
                torch.mm(z.T, hidden, **({"out_dtype": torch.float32} if wide else {}), out=grad_weight)

        if what == "backward":
            forward()
            return backward
        return forward if what == "forward" else lambda: (forward(), backward())


class LiveFloor(Floor):
    """The floor of the rows whose advantage is not zero."""

    name = "floor, live rows"

    def rows(self, p):
        live = (p.advantages != 0).repeat_interleave(len(p.hidden) // len(p.advantages))
        return p.hidden.detach()[live]


class CutCrossEntropy(LossProvider):
    """On a CPU its Triton kernels cannot run; its torch.compile version, which keeps the logits, runs instead."""

    name = "cut-cross-entropy"
    package = "cut-cross-entropy"

    def __init__(self, device):
        from cut_cross_entropy import linear_cross_entropy

        self.call = linear_cross_entropy
        self.impl = "cce" if device.type == "cuda" else "torch_compile"

    def logprobs(self, p):
        return -self.call(p.hidden, p.weight, p.targets, reduction="none", impl=self.impl).float()


class LigerGRPO(LossProvider):
    """Computes its gradients in the forward pass, so it has no forward-only mode to time."""

    name = "Liger GRPO"
    package = "liger-kernel"
    passes = ("backward", "both")

    def __init__(self, device):
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        # It compiles elementwise code on (B, T), so on a CPU compiling only adds the need for a compiler.
        compiled = device.type == "cuda"
        self.make = partial(
            LigerFusedLinearGRPOLoss, beta=0.0, use_ref_model=False, loss_type="grpo", compiled=compiled
        )

    def loss(self, p):
        targets = p.targets.view(len(p.advantages), -1)
        hidden = p.hidden.view(*targets.shape, p.hidden.shape[1])
        mask = torch.ones_like(targets, dtype=torch.float32)
        # Its default, one completion at a time, would read the whole weight for a few of our short completions.
        call = self.make(chunk_size=max(1, 1024 // targets.shape[1]))
        return call(hidden, p.weight, targets, mask, p.advantages)[0]


class LigerCrossEntropy(LossProvider):
    name = "Liger cross-entropy"
    package = "liger-kernel"

    def __init__(self, device):
        if device.type != "cuda":
            raise Absent("its Triton kernels need a GPU")
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        self.call = LigerFusedLinearCrossEntropyLoss(reduction="none")

    def logprobs(self, p):
        return -self.call(p.weight, p.hidden, p.targets)


class TRL(LossProvider):
    name = "TRL chunked"
    package = "trl"
    vocab_chunk = 32_768  # as in TRL's trainers

    def __init__(self, device):
        from trl.kernels import ChunkedLogProbFunction

        self.call = ChunkedLogProbFunction.apply

    def logprobs(self, p):
        return self.call(p.hidden, p.weight, None, p.targets, 1.0, self.vocab_chunk, None, 1.0, ())[0]


class TorchLinearCrossEntropy(LossProvider):
    name = "torch linear_cross_entropy"

    def __init__(self, device):
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            raise Absent(f"torch {torch.__version__} has no chunked linear_cross_entropy")
        self.options = torch.nn.LinearCrossEntropyOptions()

    def logprobs(self, p):
        return -F.linear_cross_entropy(p.hidden, p.weight, p.targets, reduction="none", options=self.options).float()


OURS = (Toolx, PlainTorch, Floor, LiveFloor)
PEERS = (CutCrossEntropy, LigerGRPO, LigerCrossEntropy, TRL, TorchLinearCrossEntropy)
