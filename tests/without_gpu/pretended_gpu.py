"""A pretended GPU: tensors report ``cuda:0`` but hold CPU data, so code for a GPU runs without one.

It reveals the most common faults of GPU code:

- an operation on tensors of two devices raises, and so does a Triton kernel that gets a CPU tensor;
- ``log`` lists every wait of the main thread for the device, with the line of the package that waited, and the matrix
  products between the waits;
- a CUDA graph repeats the captured operations on the memory of the capture; a wait during a capture raises, as it does
  where torch was set to raise on waits;
- ``variants`` holds the signatures that each Triton kernel would be compiled for.

Triton kernels run in the interpreter. Numbers are the CPU's, streams run in the order of the calls, and memory is
unlimited. Not covered: the compiled CUDA part; ``adamw_8bit``, because torchao compiles its step; FlexAttention, whose
visibility rule ``test_packed`` applies uncompiled in float64.

torch is patched for the whole process, so use a separate process. Any test may run on the pretended GPU:

    TRITON_INTERPRET=1 python -m pytest -p tests.without_gpu.pretended_gpu tests/without_gpu/pretended_gpu_checks.py

To torch's C++ the tensors lie on the ``meta`` device, so a torch build without CUDA suffices.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only
from triton.runtime import interpreter

from tests.without_gpu.launches import Launches

CUDA = torch.device("cuda:0")
META = torch.device("meta")
PACKAGE = str(Path(__file__).parents[2] / "toolx_kernels")

log: list[Wait | str] = []  # waits, and the names of products
variants: dict[str, set] = {}  # by the kernel's name


class Wait(NamedTuple):
    what: str
    where: str  # file:line of the package


class PretendedTensor(torch.Tensor):
    """A tensor of the pretended GPU; ``data`` is its content on the CPU."""

    @staticmethod
    def __new__(cls, data: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls, data.size(), strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype, device=META
        )
        made.on_cpu = data
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, operation, types, arguments=(), options=None):
        return run(operation, arguments, options or {})

    def __repr__(self, **_):
        return f"PretendedTensor({self.on_cpu!r})"

    def data_ptr(self):
        return self.on_cpu.data_ptr()

    def tolist(self):
        wait("tolist")
        return self.on_cpu.tolist()

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def record_stream(self, stream):
        pass


def unwrapped(value):
    return value.on_cpu if isinstance(value, PretendedTensor) else value


def on_cpu(tree):
    return tree_map_only(PretendedTensor, lambda tensor: tensor.on_cpu.detach().clone(), tree)


# ---- waits and graphs


class Graph:
    """``torch.cuda.CUDAGraph``: replays the operations recorded between ``capture_begin`` and ``capture_end``."""

    current: Graph | None = None
    replays = 0

    def __init__(self):
        self.tape = []

    def capture_begin(self, pool=None, capture_error_mode="global"):
        Graph.current = self

    def capture_end(self):
        Graph.current = None

    def replay(self):
        Graph.replays += 1
        for work in self.tape:
            work()


sync_debug_mode = "default"


def wait(what: str) -> None:
    frame = sys._getframe(1)
    while frame and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    where = f"{frame.f_code.co_filename[len(PACKAGE) + 1 :]}:{frame.f_lineno}" if frame else "outside the package"
    if Graph.current or sync_debug_mode == "error":
        raise RuntimeError(f"{what} waits for the device in a captured step, at {where}")
    if threading.current_thread() is threading.main_thread():
        log.append(Wait(what, where))


def waits() -> list[Wait]:
    return [entry for entry in log if isinstance(entry, Wait)]


def waits_before_a_product() -> list[Wait]:
    return list(itertools.takewhile(lambda entry: isinstance(entry, Wait), log))


def on_tape(work, results) -> None:
    """Records ``work`` while a graph is captured: every replay calls it and writes into the memory of ``results``."""

    def again():
        for mine, new in zip(tree_flatten(results)[0], tree_flatten(work())[0], strict=True):
            if isinstance(mine, torch.Tensor) and mine.data_ptr() != new.data_ptr():
                mine.copy_(new)

    if Graph.current:
        Graph.current.tape.append(again)


# ---- operations

PRODUCTS = {"mm", "addmm", "bmm", "sweep_kernel"}
# the host needs the shape or value of their results
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal",
    "is_nonzero", "bincount",
}  # fmt: skip
INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_"}
COPYING = {"copy_", "_to_copy"}
ops: dict[str, object] = {}  # the package's ops: the function that runs on the GPU


def run(operation, arguments, options):
    """Runs ``operation`` on the device that its tensors and options imply, as torch's dispatcher would."""
    namespace, name = operation._schema.name.split("::")
    given = [value for value in tree_flatten((arguments, options))[0] if isinstance(value, torch.Tensor)]
    on_gpu = [tensor for tensor in given if isinstance(tensor, PretendedTensor)]
    on_cpu = [tensor for tensor in given if not isinstance(tensor, PretendedTensor)]
    if namespace == "toolx" and on_gpu:
        if on_cpu:
            raise RuntimeError(f"{name} was given tensors of cuda:0 and of the CPU")
        with Names(), device:  # both are off while they handle a call
            return ops[name](*arguments, **options)
    target = options.get("device")
    makes_gpu = bool(on_gpu) if target is None else target.type == "meta"
    indexed = name in INDEXING and isinstance(arguments[0], PretendedTensor)
    if on_gpu and name not in COPYING and any(tensor.dim() for tensor in on_cpu):
        if not indexed:
            raise RuntimeError(f"Expected all tensors to be on the same device: {name} of cuda:0 and the CPU")
        wait("an index on the CPU")
    if on_gpu and name in PRODUCTS:
        log.append(name)
    if on_gpu and name in WAITING:
        wait(name)
    if indexed and any(index is not None and index.dtype == torch.bool for index in arguments[1]):
        wait("a mask as index")
    if on_gpu and name == "repeat_interleave" and options.get("output_size") is None:
        wait(name)
    if name in COPYING and not options.get("non_blocking") and not (name == "copy_" and True in arguments[2:]):
        source, to_gpu = arguments[0], makes_gpu
        if name == "copy_":
            source, to_gpu = arguments[1], isinstance(arguments[0], PretendedTensor)
        if isinstance(source, PretendedTensor) and not to_gpu:
            wait("a copy to the CPU")
        elif not isinstance(source, PretendedTensor) and to_gpu and source.dim() + (name == "_to_copy"):
            wait("a copy from the CPU")

    arguments, options = tree_map(unwrapped, arguments), tree_map(unwrapped, options)
    if target is not None:
        options["device"] = torch.device("cpu")
    function = OUT_OF_FP32.get((name, operation._overloadname), operation)
    results = function(*arguments, **options)
    if "empty" in name and results.is_floating_point():
        results.fill_(torch.nan)
    if on_gpu or makes_gpu:
        on_tape(lambda: function(*arguments, **options), results)
    mine = {id(unwrapped(tensor)): tensor for tensor in given}  # an in-place operation returns one of these

    def wrapped(result):
        if not isinstance(result, torch.Tensor):
            return result
        return mine.get(id(result), PretendedTensor(result) if makes_gpu else result)

    return tree_map(wrapped, results)


def _mm(left, right, out_dtype):
    assert left.dtype == right.dtype
    return left.to(out_dtype) @ right.to(out_dtype)


def _addmm_out(total, left, right, out_dtype, *, beta=1, out):
    assert total.dtype in (out_dtype, left.dtype)
    product = _mm(left, right, out_dtype)
    return out.copy_(product + beta * total if beta else product)


# half-precision products with sums and result in fp32, which torch lacks on a CPU
OUT_OF_FP32 = {
    ("addmm", "dtype_out"): _addmm_out,
    ("mm", "dtype"): _mm,
    ("mm", "dtype_out"): lambda left, right, out_dtype, *, out: out.copy_(_mm(left, right, out_dtype)),
}


class Device(TorchDispatchMode):
    """Runs all operations, including factories, which take no tensor."""

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        return run(operation, arguments, options or {})


class Names(TorchFunctionMode):
    """Replaces ``cuda`` by ``meta`` in every call to torch's C++."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = dict(options or {})
        if function is torch.device:
            return function(*arguments, **options)
        if options.get("pin_memory"):
            del options["pin_memory"]
        arguments = tuple(META if _is_cuda(value) else value for value in arguments)
        if _is_cuda(options.get("device")):
            if function in (torch.tensor, torch.as_tensor):  # on the meta device they would have no data
                return self._made(function, arguments, options)
            options["device"] = META
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            arguments = (arguments[0], _without_lists(arguments[1]), *arguments[2:])
        if function is torch.Tensor.cuda:
            return arguments[0].to(META)
        if function is torch.Tensor.pin_memory:
            return arguments[0].clone()
        return function(*arguments, **options)

    def _made(self, function, arguments, options):
        if isinstance(arguments[0], PretendedTensor):
            return arguments[0].to(options.get("dtype"))
        return function(*arguments, **{**options, "device": "cpu", "requires_grad": False}).to(META)


def _without_lists(index):
    """``index`` with its lists as CPU tensors: torch would put them on the meta device, where they have no data."""
    if isinstance(index, tuple):
        return tuple(map(_without_lists, index))
    return torch.tensor(index) if isinstance(index, list | np.ndarray) else index


def _is_cuda(value) -> bool:
    return isinstance(value, torch.device) and value.type == "cuda" or isinstance(value, str) and value[:4] == "cuda"


device = Device()


# ---- Triton


def _launch(kernel, *arguments, grid, warmup, **options):
    given = [value for value in (*arguments, *options.values()) if isinstance(value, torch.Tensor)]
    if not all(isinstance(tensor, PretendedTensor) for tensor in given):
        raise ValueError(f"Pointer argument of {kernel.__name__} cannot be accessed from Triton (cpu tensor?)")
    arguments, options = [unwrapped(a) for a in arguments], {name: unwrapped(o) for name, o in options.items()}
    seen = Launches(kernel)
    seen[grid](*arguments, **options)
    variants.setdefault(kernel.__name__, set()).update(seen.variants)
    if kernel.__name__ in PRODUCTS:
        log.append(kernel.__name__)

    def work():
        _interpret(kernel, *arguments, grid=grid, warmup=False, **options)

    if not warmup:
        work()
        on_tape(work, None)


_interpret = interpreter.InterpretedFunction.run


# ---- the device


class Stream:
    made, device = 0, CUDA

    def __init__(self, *_):
        Stream.made += 1

    def wait_stream(self, stream):
        pass

    def record_event(self):
        return Event()


class Event:
    def synchronize(self):
        wait("an event")


class Properties:
    name, major, minor, multi_processor_count, total_memory = "pretended", 9, 0, 132, 80 << 30


def _set_sync_debug_mode(mode):
    global sync_debug_mode
    sync_debug_mode = mode


def pytest_configure() -> None:
    """Gives the process the pretended GPU, from here on."""
    assert not any(name.startswith("toolx_kernels") for name in sys.modules), "its ops are defined already"
    nothing = lambda *_, **__: None  # noqa: E731
    context = lambda *_: contextlib.nullcontext()  # noqa: E731
    default_stream = Stream()
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda *_: Properties,
        "get_device_capability": lambda *_: (9, 0),
        "device": context,
        "device_of": context,
        "stream": context,
        "current_stream": lambda *_: default_stream,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph_pool_handle": lambda: (0, 0),
        "synchronize": lambda *_: wait("synchronize"),
        "empty_cache": nothing,
        "manual_seed": nothing,
        "get_sync_debug_mode": lambda: sync_debug_mode,
        "set_sync_debug_mode": _set_sync_debug_mode,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": nothing,
        "get_rng_state": lambda *_: torch.zeros(1, dtype=torch.uint8),
        "set_rng_state": nothing,
    }.items():
        setattr(torch.cuda, name, value)
    interpreter.InterpretedFunction.run = _launch
    torch.autograd.set_multithreading_enabled(False)
    Names().__enter__()
    device.__enter__()

    impl = torch.library.Library.impl

    def noting(library, name, function, device="", **options):
        if library.ns == "toolx" and device in ("CompositeExplicitAutograd", "CUDA"):
            ops[name] = function  # the default; a CUDA version, registered later, replaces it
        return impl(library, name, function, device, **options)

    torch.library.Library.impl = noting
    import toolx_kernels.ops  # noqa: F401 (defines every op)
