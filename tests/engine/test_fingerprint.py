"""The fingerprint: a hash of all bits of a model, the same from torch, from C++ and from one Triton launch."""

import itertools
import random

import numpy as np
import pytest
import torch

from tests.ops.cases import DEVICE
from tests.small_models import small_model
from toolx_kernels.engine.bit_sum import COLUMNS, bit_sum, column_weights, in_torch, row_weights
from toolx_kernels.engine.fingerprint import fingerprint

bit_sum_triton = pytest.importorskip("toolx_kernels.engine.bit_sum_triton")


def bits(*shape, dtype=torch.int64):
    g = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=g).view(dtype).to(DEVICE)


def test_the_sums_are_those_of_torch():
    part = bit_sum_triton.ROWS * COLUMNS // 2  # of 64 bits
    tensors = [
        bits(1), bits(COLUMNS), bits(part - 1), bits(part), bits(part + 1), bits(3, part),
         bits(40, dtype=torch.bfloat16), bits(40, dtype=torch.bfloat16)[4:], bits(0), bits(1)[0],
        # not a whole number of words, or not contiguous
        bits(40, dtype=torch.bfloat16)[1:9], bits(40, dtype=torch.float32)[:3], bits(9, dtype=torch.uint8)[2:],
        bits(8, 16).T,
    ]  # fmt: skip
    for chosen in (tensors, tensors[:1], tensors[10:11]):
        assert bit_sum_triton.bit_sums(chosen).tolist() == [bit_sum(tensor).item() for tensor in chosen]


@pytest.mark.parametrize("n", [0, 1, 7, COLUMNS, COLUMNS + 1, 64 * COLUMNS, 65 * COLUMNS + 3])
def test_the_sum_is_that_of_its_definition(n):
    words = bits(n // 2 + 1, dtype=torch.int32)[:n]
    columns, rows = column_weights(words.device), row_weights(n, words.device)
    plain = torch.zeros((), dtype=torch.int64, device=DEVICE)
    in_torch(words, columns, rows, plain)
    assert bit_sum(words) == plain
    pairs = enumerate(words.tolist())
    columns, rows = columns.tolist(), rows.tolist()
    exact = sum(x * columns[i % COLUMNS] * rows[i // COLUMNS] for i, x in pairs)
    assert (exact - plain.item()) % 2**64 == 0
    assert all(weight % 2 for weight in columns + rows) and len(set(map(abs, columns))) == COLUMNS


@pytest.mark.parametrize("dtype, n", [(torch.float32, 9), (torch.bfloat16, 17), (torch.int8, 11), (torch.float64, 3)])
def test_every_bit_counts(dtype, n):
    values = bits(2 * n, dtype=dtype)[:n].clone()
    raw, before = values.view(torch.uint8), bit_sum(values)
    for byte, bit in itertools.product(range(len(raw)), range(8)):
        raw[byte] ^= 1 << bit
        assert bit_sum(values) != before, (byte, bit)
        raw[byte] ^= 1 << bit
    assert bit_sum(values) == before


@pytest.mark.parametrize("shape", [(3, 20), (5, COLUMNS)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_small_change_cancels(dtype, shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    before, flat, chosen = bit_sum(values), values.view(-1), random.Random(0)

    def noticed(change) -> bool:
        kept = flat.clone()
        change(flat)
        seen = bit_sum(values) != before
        same = torch.equal(kept.view(torch.uint8), flat.view(torch.uint8))
        flat.copy_(kept)
        return bool(seen) or same

    for _ in range(300):
        places = torch.tensor(chosen.sample(range(len(flat)), chosen.choice([1, 2, 2, 4])), device=DEVICE)
        assert noticed(lambda t, at=places: t.index_copy_(0, at, -t[at])), places
        assert noticed(lambda t, at=places: t.index_copy_(0, at, t[at.flip(0)])), places
        assert noticed(lambda t, at=places: t.index_copy_(0, at, t[at] * (1 + torch.finfo(dtype).eps))), places
        assert noticed(lambda t, at=places: t[at[0] :].copy_(-t[at[0] :])), places
        row, column = chosen.randrange(len(values)), chosen.randrange(values.shape[1])
        assert noticed(lambda t, r=row: values.copy_(values.roll(r + 1, 0)))
        assert noticed(lambda t, c=column: values.copy_(values.roll(c + 1, 1)))
    square = values[:3, :3].contiguous()
    assert bit_sum(square) != bit_sum(square.T) != bit_sum(-square)


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


def test_global_hooks_are_seen():
    model = torch.nn.Linear(2, 2)
    for register in ("register_module_forward_hook", "register_module_forward_pre_hook"):
        before = fingerprint(model)
        handle = getattr(torch.nn.modules.module, register)(lambda *_: None)
        try:
            assert fingerprint(model).hooks == (*before.hooks, handle.id)
        finally:
            handle.remove()
        assert fingerprint(model) == before


def test_attributes_inside_containers_and_numpy_arrays_are_seen():
    model = torch.nn.Linear(2, 2)
    model.table, model.scale = np.arange(3000.0), np.float32(1.0)
    model.nested = {"a": [{"b": (1.0, torch.zeros(2), object())}]}
    model.nested["a"].append(model.nested)  # around in a circle
    inner = model.nested["a"][0]
    seen = [fingerprint(model)]
    for change in (
        lambda: model.table.__setitem__(1500, -1.0),
        lambda: setattr(model, "scale", np.float32(2.0)),
        lambda: inner["b"][1].data.fill_(1.0),
        lambda: inner.update(b=(2.0, *inner["b"][1:])),
        lambda: inner.update(b=[inner["b"][0], [inner["b"][1]]]),
    ):
        assert fingerprint(model) == seen[-1]
        change()
        assert fingerprint(model) not in seen
        seen.append(fingerprint(model))


def with_adapters():
    peft = pytest.importorskip("peft")
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    model = peft.get_peft_model(small_model("llama"), peft.LoraConfig(**settings))
    model.add_adapter("other", peft.LoraConfig(**settings))
    return model


CHANGES = {
    "in place": lambda m: m.lm_head.weight.requires_grad_(False).mul_(1.5),
    "through .data": lambda m: m.lm_head.weight.data[0].neg_(),
    "one sign": lambda m: m.model.norm.weight.data[3:4].neg_(),
    "a view": lambda m: m.model.layers[0].mlp.up_proj.weight.detach().view(-1)[5:].copy_(torch.ones(1)),
    "a new parameter": lambda m: setattr(m.lm_head, "weight", torch.nn.Parameter(m.lm_head.weight.detach().clone())),
    "loading": lambda m: m.load_state_dict({name: value + 1 for name, value in m.state_dict().items()}),
    "a buffer": lambda m: m.model.rotary_emb.inv_freq.mul_(2),
    "layers swapped": lambda m: m.model.layers.insert(0, m.model.layers.pop(1)),
    "a parameter shared": lambda m: setattr(m.model.layers[0].self_attn, "v_proj", m.model.layers[0].self_attn.k_proj),
    "another activation": lambda m: setattr(m.model.layers[0].mlp, "act_fn", torch.nn.Identity()),
    "a scale": lambda m: setattr(m.model.layers[0].self_attn, "scaling", 2.0),
    "a transposed weight": lambda m: setattr(
        m.model.layers[0].self_attn.q_proj.weight, "data", m.model.layers[0].self_attn.q_proj.weight.data.T
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_however_it_is_made(change):
    model = small_model("llama").to(DEVICE)
    model.model.layers[0].mlp.register_buffer("none", None)
    before = fingerprint(model)
    model.train()
    assert fingerprint(model) == before
    CHANGES[change](model)
    assert fingerprint(model) != before


def test_tensors_that_are_neither_parameters_nor_buffers_are_seen():
    model = small_model("llama").to(DEVICE)
    model.lm_head.scales = torch.ones(3, device=DEVICE)
    model.model.norm.tables = [torch.ones(3), torch.zeros(2)]  # on another device, if there is a GPU
    seen = {fingerprint(model).sums}
    model.lm_head.scales.data[1] = 2.0
    seen.add(fingerprint(model).sums)
    model.model.norm.tables[1].data[1] = 2.0
    seen.add(fingerprint(model).sums)
    assert len(seen) == 3


def test_tensors_inside_a_wrapper_are_seen():
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
    model = torch.nn.Linear(2, 2)
    inner = torch.ones(2, 2)
    model.register_buffer("wrapped", two_tensor.TwoTensor(torch.zeros(2, 2), inner))
    before = fingerprint(model)
    inner.data[1, 1] = -1
    assert fingerprint(model).sums != before.sums


def test_adapters_are_seen():
    model = with_adapters()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    changes = [
        lambda: model.set_adapter("other"),
        lambda: layer.scaling.update(other=0.5),
        lambda: layer.lora_B["other"].weight.data[0, :1].neg_(),
        lambda: model.merge_adapter(),
        lambda: model.unmerge_adapter(),
        lambda: model.base_model.disable_adapter_layers(),
    ]
    before = fingerprint(model)
    for change in changes:
        change()
        after = fingerprint(model)
        assert after != before and fingerprint(model) == after
        before = after


def test_a_model_made_in_inference_mode_has_one():
    with torch.inference_mode():
        model = small_model("llama").to(DEVICE)
        before = fingerprint(model)
        model.lm_head.weight[0] += 1
    assert fingerprint(model).sums != before.sums
