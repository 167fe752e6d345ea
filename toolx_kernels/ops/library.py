"""The ``toolx`` operator library: schemas, defaults, fake kernels, and the compiled part if there is one.

An op is defined once, with a plain torch default that runs on every device. Faster kernels are registered under
the same name for one device: in C++ and CUDA by the compiled part (``csrc/``), from Python by the files in ``ops/``.
If the compiled part is absent, ``compiled_error`` says why and the defaults are used.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, get_type_hints

import torch
from torch import Tensor

DEVICES = ("CPU", "CUDA")
COMPILED = {"CPU": "compiled C++", "CUDA": "compiled CUDA"}
FROM_PYTHON = {"CPU": "torch, written for the CPU", "CUDA": "Triton"}
DEFAULT = "plain torch"

library = torch.library.Library("toolx", "DEF")
_compiled_ops: dict[str, set[str]] = {}  # every op, and the devices with a kernel before Python registered any


# The types of arguments in torch's schema language.
SCHEMA_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", list[bool]: "bool[]", float: "float", int: "int", int | None: "int?",
    str: "str",
}  # fmt: skip


def arguments(kind: Any) -> str:
    """The fields of a NamedTuple as arguments of a schema; the only possible default is None."""
    defaults = kind._field_defaults
    types = get_type_hints(kind)
    return ", ".join(f"{SCHEMA_TYPES[types[f]]} {f}{'=None' * (f in defaults)}" for f in kind._fields)


def load_compiled() -> str | None:
    """Loads ``toolx_kernels._C``, which registers its kernels. Returns None, or the reason for a failure."""
    try:
        importlib.import_module("toolx_kernels._C")
    except ModuleNotFoundError:
        return "it was not built when the package was installed"
    except (ImportError, OSError) as error:
        built_for_cuda = any(name in str(error) for name in ("libtorch_cuda", "libc10_cuda", "libcudart"))
        if built_for_cuda and not torch.version.cuda:
            return f"it was built for a CUDA build of torch, and this torch ({torch.__version__}) is a CPU build"
        if built_for_cuda:
            return f"it was built for another CUDA version than {torch.version.cuda}, the one of this torch: {error}"
        if "undefined symbol" in str(error):
            return f"it was built for another version of torch than this one ({torch.__version__}): {error}"
        return f"it could not be loaded: {error}"
    return None


# Loaded before any op is defined: a kernel that the dispatcher has when an op is defined is a compiled one.
compiled_error: str | None = load_compiled()


def define(schema: str, *, default: Callable, fake: Callable, triton: Callable | None = None) -> None:
    """Defines ``toolx::<schema>``.

    Args:
        schema: name, arguments and results in torch's schema language, without the namespace.
        default: plain torch implementation for every device, below autograd.
        fake: for ``torch.compile``: takes the same arguments on the meta device and returns empty results of the right
            shape, dtype and device; None for an op that only writes into its arguments.
        triton: implementation for CUDA that launches Triton kernels; registered if triton is installed and the
            compiled part has no CUDA kernel for the op.
    """
    name = schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _compiled_ops[name] = {device for device in DEVICES if _has_kernel(name, device)}
    library.impl(name, default, "CompositeExplicitAutograd")
    if triton is not None and "CUDA" not in _compiled_ops[name] and importlib.util.find_spec("triton"):
        library.impl(name, triton, "CUDA")
    torch.library.register_fake(f"toolx::{name}", fake, lib=library)


def backends() -> dict[str, dict[str, str]]:
    """The implementation of each op on each device, as ``{op: {"CPU": words, "CUDA": words}}``, from the dispatcher."""
    return {name: {device: _backend(name, device) for device in DEVICES} for name in _compiled_ops}


def _backend(name: str, device: str) -> str:
    if device in _compiled_ops[name]:
        return COMPILED[device]
    return FROM_PYTHON[device] if _has_kernel(name, device) else DEFAULT


def _has_kernel(name: str, device: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"toolx::{name}", device)
