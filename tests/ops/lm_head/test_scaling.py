"""Scaling by the factor of a backward pass: exact, and a later pass never sees gradients scaled by an earlier one."""

import pytest
import torch

from tests.ops.cases import DEVICE, make_case, needs_triton, with_leaves, without_logprobs
from toolx_kernels import linear_grpo_loss
from toolx_kernels.ops.lm_head import scaling


@needs_triton
@pytest.mark.parametrize("factor", [1.0, 0.3, -(2.0**9), torch.nan])
def test_the_kernel_rounds_as_torch_does(factor):
    factor = torch.tensor(factor, device=DEVICE)
    dtypes = torch.float32, torch.float16
    gradients = [torch.randn(n, 3, device=DEVICE).to(dtype) for n in (0, 1, 5000) for dtype in dtypes]
    wanted = [(gradient.float() * factor).to(gradient.dtype) for gradient in gradients]
    scaling.scale_in_place(gradients, factor)
    torch.testing.assert_close(gradients, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_graph_that_is_kept_gives_the_same_gradients_again(factor):
    case, leaves = with_leaves(without_logprobs(make_case()))
    loss = linear_grpo_loss(**case).loss * factor
    first, again = (torch.autograd.grad(loss, leaves.values(), retain_graph=True) for _ in range(2))
    first = [gradient.clone() for gradient in first]
    last = torch.autograd.grad(loss, leaves.values())
    for of_leaf in zip(first, again, last, strict=True):
        assert torch.equal(of_leaf[0], of_leaf[1]) and torch.equal(of_leaf[0], of_leaf[2])


@needs_triton
def test_on_a_gpu_only_a_graph_that_is_let_go_is_scaled_in_place(monkeypatch):
    """As on a GPU: the host never reads the factor."""
    calls, original = [], scaling.scale_in_place
    monkeypatch.setattr(scaling, "on_gpu", lambda _: True)
    monkeypatch.setattr(scaling, "scale_in_place", lambda *a: calls.append(1) or original(*a))
    case, leaves = with_leaves(without_logprobs(make_case()))
    loss = linear_grpo_loss(**case).loss * 0.5
    kept = torch.autograd.grad(loss, leaves.values(), retain_graph=True)
    assert not calls
    last = torch.autograd.grad(loss, leaves.values())
    assert calls and all(map(torch.equal, kept, last))
