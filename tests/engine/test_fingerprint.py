"""The fingerprint: one launch over all tensors of a model gives the same bit sums as torch for each tensor."""

import pytest
import torch

from tests.ops.cases import DEVICE
from tests.small_models import small_model
from toolx_kernels.engine.bit_sum import COLUMNS, bit_sum
from toolx_kernels.engine.fingerprint import fingerprint

bit_sum_triton = pytest.importorskip("toolx_kernels.engine.bit_sum_triton")


def bits(*shape, dtype=torch.int64):
    g = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=g).view(dtype).to(DEVICE)


def test_the_sums_are_those_of_torch():
    part = bit_sum_triton.ROWS * COLUMNS
    tensors = [
        bits(1), bits(COLUMNS), bits(part - 1), bits(part), bits(part + 1), bits(3, part),
        bits(40, dtype=torch.bfloat16), bits(40, dtype=torch.bfloat16)[4:], bits(0), bits(1)[0],
        # not a whole number of words, or not contiguous
        bits(40, dtype=torch.bfloat16)[1:9], bits(40, dtype=torch.float32)[:3], bits(9, dtype=torch.uint8)[2:],
        bits(8, 16).T,
    ]  # fmt: skip
    for chosen in (tensors, tensors[:1], tensors[10:11]):
        assert bit_sum_triton.bit_sums(chosen).tolist() == [bit_sum(tensor).item() for tensor in chosen]


def test_a_table_serves_until_a_tensor_moves():
    tensors = [bits(100), bits(7)]
    before = bit_sum_triton.bit_sums(tensors)
    made = bit_sum_triton._parts.cache_info().misses
    tensors[0][99] += 1
    after = bit_sum_triton.bit_sums(tensors)
    assert bit_sum_triton._parts.cache_info().misses == made
    assert (after != before).tolist() == [True, False]
    assert bit_sum_triton.bit_sums([tensors[0].clone(), tensors[1]]).tolist() == after.tolist()


def test_the_fingerprint_sees_every_bit():
    model = small_model("llama").to(DEVICE).bfloat16()
    odd = torch.nn.Parameter(torch.zeros(10, dtype=torch.bfloat16, device=DEVICE)[1:6])
    model.register_parameter("odd", odd)
    before = fingerprint(model)
    assert fingerprint(model) == before
    odd.data[4] += 1e-3
    assert fingerprint(model)._replace(sums=()) == before._replace(sums=())
    assert fingerprint(model).sums != before.sums


def test_a_hook_in_the_place_of_another_is_seen():
    """Hooks are identified by number: a new hook may have the address of the previous one."""
    model = small_model("llama")
    seen = set()
    for _ in range(20):
        handle = model.lm_head.register_forward_hook(lambda *_: None)
        assert fingerprint(model).hooks == (handle.id,)
        seen.add(fingerprint(model).hooks)
        handle.remove()
    assert len(seen) == 20 and fingerprint(model).hooks == ()
