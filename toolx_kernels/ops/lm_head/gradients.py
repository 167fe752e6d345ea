"""Gradients of the head's inputs, accumulated from tiles of the gradient of the logits: two GEMMs per tile."""

from __future__ import annotations

import torch
from torch import Tensor

from toolx_kernels.ops.lm_head.head import Head, HeadGradients, Trained
from toolx_kernels.ops.lm_head.vocab_shard import reducer


class Gradients:
    """Accumulates, in fp32 (or float64), the gradients of the inputs that need one: the backward pass's two GEMMs.

    Gradients of weight and bias are rounded once. With ``whole_weight`` they are kept in full precision until the end;
    if a single GEMM is added (``one_gemm``), the GEMM itself rounds its result. Otherwise only the open rows are in
    full precision, until they are closed.
    """

    def __init__(
        self, head: Head, needs: Trained, gemm_dtype: torch.dtype, *, whole_weight: bool, one_gemm: bool = False
    ):
        self.head, self.gemm_dtype = head, gemm_dtype

        def empty(needed: bool, like: Tensor | None) -> Tensor | None:
            if not needed or like is None:
                return None
            rounded = not whole_weight or (one_gemm and like.dtype == gemm_dtype)
            return torch.empty(like.shape, dtype=like.dtype if rounded else head.dtype, device=like.device)

        hidden = head.hidden
        self.hidden = torch.zeros(hidden.shape, dtype=head.dtype, device=hidden.device) if needs.hidden else None
        self.whole = [empty(needs.weight, head.weight), empty(needs.bias, head.bias)]
        self.open = self.whole
        self.begun = False  # the first GEMM into the open rows overwrites them, so they need not be zeroed

    def open_weight(self, columns: slice) -> None:
        """Opens rows ``columns`` of the gradients of weight and bias: accumulates them, in full precision."""
        self.begun = False
        self.open = [
            None if t is None else torch.empty(t[columns].shape, dtype=self.head.dtype, device=t.device)
            for t in self.whole
        ]

    def close_weight(self, columns: slice) -> None:
        self._settle()
        for whole, part in zip(self.whole, self.open, strict=True):
            if whole is not None:
                whole[columns] = part

    def _settle(self) -> None:
        if not self.begun:
            for part in self.open:
                if part is not None:
                    part.zero_()

    def add_weight(self, dz: Tensor, blocks: list[slice], hidden: Tensor, factor: Tensor | None) -> None:
        """Adds ``dz^T (factor * hidden)``, and for the bias ``dz^T factor``, to the open rows, block by block.

        dz: (n, columns), the gradient of the logits without the rows' ``factor`` (n).
        """
        weight, bias = self.open
        sides = []
        if weight is not None:
            scaled = hidden if factor is None else hidden.to(self.head.dtype) * factor[:, None]
            sides.append((weight, scaled.to(self.gemm_dtype)))
        if bias is not None:
            ones = dz.new_ones(len(dz), dtype=self.head.dtype) if factor is None else factor
            sides.append((bias[:, None], ones[:, None]))
        if not sides:
            return
        for columns in blocks:
            left = dz[:, columns].T.to(self.gemm_dtype)
            for total, right in sides:
                self.multiply(total[columns], left, right, fresh=not self.begun)
        self.begun = True

    def multiply(self, total: Tensor, left: Tensor, right: Tensor, *, fresh: bool = False) -> None:
        """``total += left @ right``, or ``total = left @ right`` if ``fresh``."""
        left, right, beta = left.to(self.gemm_dtype), right.to(self.gemm_dtype), 0 if fresh else 1
        if total.dtype == self.gemm_dtype:
            total.addmm_(left, right, beta=beta)
        else:  # never on a CPU, where torch has no bf16 product with an fp32 result
            torch.addmm(total, left, right, beta=beta, out_dtype=total.dtype, out=total)

    def results(self) -> HeadGradients:
        if self.open is self.whole:
            self._settle()
        head, (weight, bias) = self.head, self.whole
        hidden = None if self.hidden is None else reducer(head.shard)(self.hidden, "sum")
        pairs = ((hidden, head.hidden), (weight, head.weight), (bias, head.bias))
        return HeadGradients(*(None if x is None or like is None else x.to(like.dtype) for x, like in pairs))
