"""Setup of the compiled extension; pyproject.toml declares the rest.

TOOLX_BUILD_EXT: unset builds it if possible and otherwise prints why not, 1 fails without it, 0 leaves it out.
"""

import os
from pathlib import Path

from setuptools import setup

WANTED = os.environ.get("TOOLX_BUILD_EXT", "")
ARCHITECTURES = "8.0;8.6;8.9;9.0;12.0+PTX"
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10, the oldest ABI that has what we use


def give_up(reason) -> None:
    if WANTED == "1":
        raise SystemExit(f"toolx_kernels: TOOLX_BUILD_EXT=1, but the extension cannot be built: {reason}")
    print(f"toolx_kernels: installing as pure Python, without the compiled extension: {reason}", flush=True)


def extension() -> dict:
    """The setuptools keywords that build ``toolx_kernels._C``."""
    # nvcc may be a shim in /usr/local/bin, from which torch would infer a CUDA_HOME without libraries.
    if Path("/usr/local/cuda/include/cuda_runtime.h").exists():
        os.environ.setdefault("CUDA_HOME", "/usr/local/cuda")
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    class Build(BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:
                give_up(str(error).strip().partition("\n")[0])

    # Not torch.cuda.is_available(): containers are built on machines without a GPU.
    with_cuda = bool(torch.version.cuda and CUDA_HOME)
    if with_cuda and not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    sources = ["csrc/ops.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]
    flags = {"cxx": ["-O3", "-g0", TORCH_TARGET]}
    if with_cuda:
        sources += sorted(map(str, Path("csrc/cuda").glob("*.cu")))
        flags["cxx"].append("-DUSE_CUDA")
        flags["nvcc"] = ["-O3", "-DUSE_CUDA", TORCH_TARGET]
    module = (CUDAExtension if with_cuda else CppExtension)(
        "toolx_kernels._C",
        sources=sources,
        depends=sorted(map(str, Path("csrc").rglob("*.h"))),
        extra_compile_args=flags,
        py_limited_api=True,
        optional=WANTED != "1",
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if WANTED == "0":
    print("toolx_kernels: installing as pure Python, because TOOLX_BUILD_EXT=0", flush=True)
    keywords = {}
else:
    try:
        keywords = extension()
    except ImportError as error:
        give_up(f"{error} (install torch first, then add --no-build-isolation)")
        keywords = {}
# Not in pyproject.toml: setuptools older than 77 rejects the form that newer versions require there.
setup(license="Apache-2.0", **keywords)
