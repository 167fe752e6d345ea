"""The operator library: definitions, fallback and the compiled paged KV write."""

import importlib
import importlib.util
import os

import pytest
import torch

from toolx_kernels import reference
from toolx_kernels.ops import library

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
kv_write = torch.ops.toolx.kv_write
needs_compiled = pytest.mark.skipif(
    library.compiled_error is not None, reason="promised by the compiled CPU kernel alone, which is absent"
)


def kv_case(tokens, pages, page_size, heads, head_dim, dtype, seed=0, strided=True):
    """Random key and value, caches filled with NaN, and distinct slots; every fifth token is padding."""
    generator = torch.Generator().manual_seed(seed)
    if strided:
        # Transposed slices of a fused QKV projection: strided over tokens and heads, dense in Dh.
        fused = torch.randn(3 * heads, tokens, head_dim, generator=generator).to(dtype)
        key, value = fused.transpose(0, 1)[:, heads : 2 * heads], fused.transpose(0, 1)[:, 2 * heads :]
    else:
        key, value = torch.randn(2, tokens, heads, head_dim, generator=generator).to(dtype)
    key_cache = torch.full((pages, page_size, heads, head_dim), float("nan"), dtype=dtype)
    slots = torch.randperm(pages * page_size, generator=generator)[:tokens]
    slots[4::5] = -1
    return key, value, key_cache, key_cache.clone(), slots


def expected_caches(key, value, key_cache, value_cache, slots):
    """The caches that ``kv_write`` must produce, computed independently: padding dropped, then one ``index_put``."""
    key_cache, value_cache = key_cache.clone(), value_cache.clone()
    page, offset = slots.div(key_cache.shape[1], rounding_mode="floor"), slots % key_cache.shape[1]
    kept = slots >= 0
    key_cache[page[kept], offset[kept]] = key[kept]
    value_cache[page[kept], offset[kept]] = value[kept]
    return key_cache, value_cache


def assert_same_bits(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [1, 7, 16])
@pytest.mark.parametrize("write", [kv_write, reference.kv_write], ids=["op", "reference"])
def test_kv_write_fills_exactly_its_slots(write, page_size, dtype):
    for heads, head_dim, tokens in [(1, 64, 9), (3, 5, 17), (8, 32, 40)]:
        for strided in (True, False):
            case = kv_case(tokens, 60 // page_size + 1, page_size, heads, head_dim, dtype, strided=strided)
            expected = expected_caches(*case)
            assert write(*case) is None
            assert_same_bits(case[2], expected[0])
            assert_same_bits(case[3], expected[1])


def test_kv_write_takes_rows_whose_head_dim_is_strided():
    key, value, key_cache, value_cache, slots = kv_case(6, 2, 4, 2, 8, torch.float32)
    case = key.mT.contiguous().mT, value.mT.contiguous().mT, key_cache, value_cache, slots
    assert case[0].stride(-1) != 1
    expected = expected_caches(*case)
    kv_write(*case)
    assert_same_bits(key_cache, expected[0])
    assert_same_bits(value_cache, expected[1])


def test_kv_write_of_strided_slots():
    key, value, key_cache, value_cache, slots = kv_case(6, 2, 4, 2, 8, torch.float32)
    strided = torch.stack([slots, torch.full_like(slots, 10**9)], dim=1)[:, 0]
    expected = expected_caches(key, value, key_cache, value_cache, slots)
    kv_write(key, value, key_cache, value_cache, strided)
    assert_same_bits(key_cache, expected[0])


@needs_compiled
def test_kv_write_large_enough_for_threads_keeps_the_last_of_equal_slots():
    key, value, key_cache, value_cache, _ = kv_case(4096, 4, 16, 8, 64, torch.float32)
    slots = torch.randint(64, (4096,), generator=torch.Generator().manual_seed(1))
    last = {slot: position for position, slot in enumerate(slots.tolist())}
    kv_write(key, value, key_cache, value_cache, slots)
    for slot, position in last.items():
        assert_same_bits(key_cache.flatten(0, 1)[slot], key[position])
        assert_same_bits(value_cache.flatten(0, 1)[slot], value[position])


def test_kv_write_of_no_tokens_and_of_padding_alone_changes_nothing():
    for tokens in (0, 3):
        key, value, key_cache, value_cache, slots = kv_case(tokens, 2, 4, 2, 8, torch.float32)
        kv_write(key, value, key_cache, value_cache, torch.full_like(slots, -1))
        assert key_cache.isnan().all() and value_cache.isnan().all()


@pytest.mark.parametrize("bad", [8, -2, 2**40])
def test_kv_write_out_of_range_names_the_slot_and_writes_nothing(bad):
    key, value, key_cache, value_cache, slots = kv_case(6, 2, 4, 2, 8, torch.float32)
    slots[5] = bad
    with pytest.raises((RuntimeError, ValueError), match=rf"slots\[5\] = {bad} is outside \[-1, 8\)"):
        kv_write(key, value, key_cache, value_cache, slots)
    assert key_cache.isnan().all() and value_cache.isnan().all()


@needs_compiled
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(key=lambda t: t[0]), "must have 3 dimensions"),
        (dict(value=lambda t: t[:, :, :4]), "key and value differ in dimension 2: 8 and 4"),
        (dict(value_cache=lambda t: t[:1]), "differ in dimension 0: 2 and 1"),
        (dict(key=lambda t: t[:, :1], value=lambda t: t[:, :1]), r"\(1, 8\) heads and head dim, the cache \(2, 8\)"),
        (dict(slots=lambda t: t[:3]), "6 tokens need as many slots; got 3"),
        (dict(slots=lambda t: t.int()), "slots must be int64"),
        (dict(key=lambda t: t.bfloat16()), "must have one dtype"),
        (dict(key_cache=lambda t: t.mT.contiguous().mT), "must be contiguous"),
    ],
)
def test_compiled_kv_write_refuses_what_would_read_or_write_out_of_bounds(change, message):
    names = ["key", "value", "key_cache", "value_cache", "slots"]
    case = dict(zip(names, kv_case(6, 2, 4, 2, 8, torch.float32), strict=True))
    case |= {name: function(case[name]) for name, function in change.items()}
    with pytest.raises(RuntimeError, match=message):
        kv_write(*case.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    key, value, key_cache, value_cache, slots = kv_case(9, 3, 7, 2, 8, dtype)
    result = torch.library.opcheck(kv_write.default, (key, value, key_cache.zero_(), value_cache.zero_(), slots))
    assert set(result.values()) == {"SUCCESS"}


def test_kv_write_is_seen_through_compile():
    def step(key, value, key_cache, value_cache, slots):
        kv_write(key * 2, value, key_cache, value_cache, slots)
        return key_cache.nan_to_num().sum()

    case = kv_case(9, 3, 7, 2, 8, torch.float32)
    key, value, key_cache, value_cache, slots = case
    expected = expected_caches(key * 2, value, key_cache, value_cache, slots)
    total = torch.compile(step, backend="aot_eager", fullgraph=True)(*case)
    assert_same_bits(key_cache, expected[0])
    assert_same_bits(value_cache, expected[1])
    torch.testing.assert_close(total, expected[0].nan_to_num().sum())


def test_kv_write_on_the_meta_device():
    assert kv_write(*(tensor.to("meta") for tensor in kv_case(4, 2, 4, 2, 8, torch.float32))) is None


def test_the_dispatcher_runs_what_backends_reports():
    """The default consists of torch's own ops; the compiled kernel calls none of them that does any work."""
    built = library.compiled_error is None
    assert library.backends()["kv_write"]["CPU"] == (library.COMPILED["CPU"] if built else library.DEFAULT)
    case = kv_case(9, 3, 7, 2, 8, torch.float32)
    with torch.profiler.profile() as profile:
        kv_write(*case)
    called = {event.key for event in profile.key_averages()}
    assert "toolx::kv_write" in called
    other_ops = {key for key in called if key.startswith("aten::")} - {"aten::contiguous"}
    assert bool(other_ops) == (not built)


def test_the_build_switch_is_obeyed():
    switch = os.environ.get("TOOLX_BUILD_EXT")
    if switch == "1":
        assert library.compiled_error is None
    if switch == "0":
        assert library.compiled_error == "it was not built when the package was installed"
        has_triton = importlib.util.find_spec("triton") is not None
        on_cuda = library.FROM_PYTHON["CUDA"] if has_triton else library.DEFAULT
        assert library.backends()["kv_write"] == {"CPU": library.DEFAULT, "CUDA": on_cuda}


@pytest.mark.parametrize(
    "raised, words",
    [
        (ModuleNotFoundError("No module named 'toolx_kernels._C'"), "was not built"),
        (ImportError("libtorch_cuda.so: cannot open shared object file"), "built for a CUDA build of torch"),
        (ImportError("_C.abi3.so: undefined symbol: torch_parallel_for"), "built for another version of torch"),
        (OSError("wrong ELF class"), "could not be loaded: wrong ELF class"),
    ],
)
def test_a_compiled_part_that_does_not_load_is_explained_and_not_raised(monkeypatch, raised, words):
    def fail(name):
        assert name == "toolx_kernels._C"
        raise raised

    monkeypatch.setattr(importlib, "import_module", fail)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert words in library.load_compiled()


def test_define_gives_an_op_a_default_a_fake_and_a_place_in_backends():
    library.define("test_twice(Tensor x) -> Tensor", default=lambda x: x * 2, fake=lambda x: torch.empty_like(x))
    try:
        assert library.backends()["test_twice"]["CPU"] == library.DEFAULT
        library.library.impl("test_twice", lambda x: x + x, "CPU")
        assert library.backends()["test_twice"]["CPU"] == library.FROM_PYTHON["CPU"]
        torch.library.opcheck(torch.ops.toolx.test_twice.default, (torch.ones(3),))
    finally:
        del library._compiled_ops["test_twice"]


def test_define_leaves_a_compiled_cuda_kernel_in_its_place():
    """A compiled kernel is registered before Python defines the op."""
    pytest.importorskip("triton")
    compiled = torch.library.Library("toolx", "FRAGMENT")
    names = ("test_compiled", "test_not_compiled")
    try:
        compiled.impl(names[0], lambda x: x * 2, "CUDA")
        for name in names:
            library.define(f"{name}(Tensor x) -> Tensor", default=torch.neg, fake=torch.empty_like, triton=torch.clone)
        on_cuda = [library.backends()[name]["CUDA"] for name in names]
        assert on_cuda == [library.COMPILED["CUDA"], library.FROM_PYTHON["CUDA"]]
        run = [getattr(torch.ops.toolx, name).default for name in names]
        assert [int(op._op_dk(torch._C.DispatchKey.CUDA, torch.tensor(3))) for op in run] == [6, 3]
    finally:
        for name in names:
            library._compiled_ops.pop(name, None)
        compiled._destroy()
