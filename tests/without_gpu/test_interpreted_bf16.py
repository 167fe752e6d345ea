"""``interpreted_bf16``: bf16 in Triton's interpreter gives the results of a GPU."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted on a GPU")
bf16 = torch.bfloat16


@triton.jit
def everything_kernel(a_ptr, b_ptr, out_ptr, product_ptr, row_ptr, bits_ptr, half_ptr, N: tl.constexpr):
    in_n = tl.arange(0, N)
    place = in_n[:, None] * N + in_n[None, :]
    a, b = tl.load(a_ptr + place), tl.load(b_ptr + place, mask=in_n[None, :] < N - 1, other=-0.3)
    plane = N * N
    tl.store(out_ptr + place, a + b)
    tl.store(out_ptr + plane + place, a - b)
    tl.store(out_ptr + 2 * plane + place, a * b)
    tl.store(out_ptr + 3 * plane + place, a / b)
    tl.store(out_ptr + 4 * plane + place, tl.maximum(a, b))
    tl.store(out_ptr + 5 * plane + place, tl.where(a < b, a, -b))
    tl.store(out_ptr + 6 * plane + place, tl.abs(a))
    tl.store(out_ptr + 7 * plane + place, tl.exp(a.to(tl.float32)))  # the store rounds
    tl.store(out_ptr + 8 * plane + place, (a > 0).to(tl.bfloat16) + place)  # int32 and bf16
    tl.store(product_ptr + place, tl.dot(a, b))
    tl.store(product_ptr + plane + place, tl.dot(a, tl.trans(b), tl.full((N, N), 1.0, tl.float32)))
    tl.store(row_ptr + in_n, tl.sum(a, 1))
    tl.store(row_ptr + N + in_n, tl.max(b, 1))
    tl.store(row_ptr + 2 * N + in_n, tl.cumsum(tl.sum(a, 1).to(tl.bfloat16), 0))
    tl.store(bits_ptr + place, a.to(tl.int16, bitcast=True))
    tl.store(half_ptr + place, a.to(tl.float16))


def test_what_a_kernel_does_with_bf16():
    n = 16
    a, b = torch.randn(2, n, n, generator=torch.Generator().manual_seed(0)).to(bf16)
    out, product, row = torch.empty(9, n, n, dtype=bf16), torch.empty(2, n, n), torch.empty(3, n, dtype=bf16)
    bits, half = torch.empty(n, n, dtype=torch.int16), torch.empty(n, n, dtype=torch.float16)
    everything_kernel[(1,)](a, b, out, product, row, bits, half, n)
    b[:, -1] = -0.3
    place = torch.arange(n * n).view(n, n)
    elementwise = [
        a + b, a - b, a * b, a / b, a.maximum(b), torch.where(a < b, a, -b), a.abs(), a.float().exp().to(bf16),
        (a > 0).to(bf16) + place.to(bf16),
    ]  # fmt: skip
    for got, wanted in zip(out, elementwise, strict=True):
        assert torch.equal(got, wanted)
    torch.testing.assert_close(product[0], a.float() @ b.float())
    torch.testing.assert_close(product[1], a.float() @ b.float().T + 1)
    torch.testing.assert_close(row[0], a.float().sum(1).to(bf16))
    torch.testing.assert_close(row[1], b.amax(1), rtol=0, atol=0)
    torch.testing.assert_close(row[2], row[0].cumsum(0))
    assert torch.equal(bits, a.view(torch.int16)) and torch.equal(half, a.half())


@triton.jit
def cast_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(tl.bfloat16))


def test_rounding_is_to_nearest_with_ties_to_even():
    """Values halfway between two bf16 numbers and next to it; overflow, denormals and NaN."""
    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0x3F817FFF, 0x7F7FFFFF, 0x7F800000, 0x00018001, 0x7FFFFFFF]
    x = torch.tensor(bits + [word - 2**31 for word in bits], dtype=torch.int32).view(torch.float32)
    out = torch.empty(16, dtype=bf16)
    cast_kernel[(1,)](x, out, 16)
    torch.testing.assert_close(out, x.to(bf16), rtol=0, atol=0, equal_nan=True)


@triton.jit
def add_kernel(x_ptr):
    tl.atomic_add(x_ptr, tl.load(x_ptr))


def test_atomics_are_refused():
    with pytest.raises(triton.runtime.errors.InterpreterError, match="an atomic on bf16"):
        add_kernel[(1,)](torch.ones(1, dtype=bf16))
