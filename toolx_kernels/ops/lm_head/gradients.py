"""The gradients of the head's inputs, accumulated from tiles of the gradient of the logits: two GEMMs a tile."""

from __future__ import annotations

import torch
from torch import Tensor

from toolx_kernels.ops.lm_head.head import Head, blocks
from toolx_kernels.ops.lm_head.vocab_shard import reducer


class Gradients:
    """Accumulates, in fp32 (or float64), the gradients of whatever needs one; the two GEMMs of the backward pass.

    Those of the weight are rounded once. With ``whole_weight`` they stay in full precision until the end, or, where
    one GEMM is all that is added (``one_gemm``), are what it rounds its result to. Otherwise only the rows that are
    open are in full precision, until they are closed.
    """

    def __init__(
        self, head: Head, lora: tuple[Tensor | None, float], needs: list[bool], gemm_dtype: torch.dtype, *,
        whole_weight: bool, one_gemm: bool = False,
    ):  # fmt: skip
        self.head, self.gemm_dtype = head, gemm_dtype
        self.lora_a, self.lora_scaling = lora
        need_hidden, need_weight, need_bias, self.need_lora_a, need_lora_b = needs
        need_features = head.features is not None and (need_hidden or self.need_lora_a)

        def zeros(needed: bool, like: Tensor | None) -> Tensor | None:
            return torch.zeros(like.shape, dtype=head.dtype, device=like.device) if needed else None

        def result(needed: bool, like: Tensor | None) -> Tensor | None:
            if not needed:
                return None
            rounded = not whole_weight or (one_gemm and like.dtype == gemm_dtype)
            return torch.empty(like.shape, dtype=like.dtype if rounded else head.dtype, device=like.device)

        self.hidden, self.features = zeros(need_hidden, head.hidden), zeros(need_features, head.features)
        of_weight = [(need_weight, head.weight), (need_lora_b, head.lora_b), (need_bias, head.bias)]
        self.whole = [result(needed, like) for needed, like in of_weight]  # weight, lora_b, bias
        self.open = self.whole
        self.begun = False  # the first GEMM into the open rows overwrites them, which spares setting them to zero

    def open_weight(self, columns: slice) -> None:
        """From here on rows ``columns`` of the weight's gradients are accumulated, in full precision."""
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

    def add_weight(
        self, dz: Tensor, blocks: list[slice], hidden: Tensor, features: Tensor | None, factor: Tensor | None
    ) -> None:
        """``dz^T (factor * hidden)`` and so on, into the open rows of the weight's gradients, a block at a time.

        dz: (n, columns), the gradient of the logits up to the rows' ``factor`` (n).
        """

        def scaled(tensor: Tensor) -> Tensor:
            tensor = tensor if factor is None else tensor.to(self.head.dtype) * factor[:, None]
            return tensor.to(self.gemm_dtype)

        weight, lora_b, bias = self.open
        sides = []
        if weight is not None:
            sides.append((weight, scaled(hidden)))
        if lora_b is not None:
            sides.append((lora_b, scaled(features)))
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
        """total += left @ right, or = where ``fresh``."""
        left, right, beta = left.to(self.gemm_dtype), right.to(self.gemm_dtype), 0 if fresh else 1
        if total.dtype == self.gemm_dtype:
            total.addmm_(left, right, beta=beta)
        else:  # never on a CPU, which has no product from bf16 to fp32
            torch.addmm(total, left, right, beta=beta, out_dtype=total.dtype, out=total)

    def results(self, spread: tuple[Tensor, int] | None, shard: int) -> tuple[Tensor, ...]:
        """(hidden, weight, bias, lora_a, lora_b) in the dtypes of what they are gradients of."""
        if self.open is self.whole:
            self._settle()
        head, all_reduce = self.head, reducer(shard)
        hidden, features = (None if t is None else all_reduce(t, "sum") for t in (self.hidden, self.features))
        lora_a = None
        if features is not None:
            features *= self.lora_scaling
            if hidden is not None:
                hidden.addmm_(features, self.lora_a.to(head.dtype))
            if self.need_lora_a:
                lora_a = torch.zeros(self.lora_a.shape, dtype=head.dtype, device=features.device)
                for rows in blocks(len(features), 4096):
                    lora_a.addmm_(features[rows].T, head.hidden[rows].to(head.dtype))
        if hidden is not None:
            hidden = hidden.to(head.hidden.dtype)
            if spread is not None:
                rows, n_rows = spread
                hidden = hidden.new_zeros(n_rows, hidden.shape[1]).index_copy_(0, rows, hidden)
        weight, lora_b, bias = self.whole
        pairs = ((hidden, head.hidden), (weight, head.weight), (bias, head.bias), (lora_a, self.lora_a),
                 (lora_b, head.lora_b))  # fmt: skip
        return tuple(head.hidden.new_empty(0) if total is None else total.to(like.dtype) for total, like in pairs)
