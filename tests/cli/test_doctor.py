"""toolx doctor in the states a machine can be in."""

import importlib.util
from importlib.metadata import version

import pytest
import torch

from toolx_kernels.cli import doctor
from toolx_kernels.models import peft_library
from toolx_kernels.ops import library
from toolx_kernels.versions import standing

CUDA_ONLY = "it was built for a CUDA build of torch, and this torch (2.13.0+cpu) is a CPU build"


def lines_of(report, start):
    return [line for line in report.splitlines() if line.strip().startswith(start)]


def test_report_here_names_versions_and_the_backend_of_every_op():
    report = doctor.report()
    (line,) = lines_of(report, "torch ")
    assert line.split(maxsplit=2)[1:] == [torch.__version__, standing("torch", torch.__version__)]
    for name, by_device in library.backends().items():
        (line,) = [line for line in report.splitlines() if line.split()[:1] == [name]]
        assert f"CPU: {by_device['CPU']}" in line


@pytest.mark.parametrize("error", ["it was not built when the package was installed", CUDA_ONLY])
def test_report_without_the_compiled_part_says_why_and_how_to_get_it(monkeypatch, error):
    monkeypatch.setattr(library, "compiled_error", error)
    monkeypatch.setattr(library, "_compiled_ops", {"kv_write": set()})
    monkeypatch.setattr(library, "_has_kernel", lambda name, device: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = doctor.report()
    assert f"Compiled part: absent, because {error}." in report
    assert doctor.BUILD_COMMAND in report
    assert lines_of(report, "kv_write")[0].endswith(f"CPU: {library.DEFAULT}")
    assert "CUDA:" not in report


@pytest.mark.parametrize("devices, words", [({"CPU"}, "built for the CPU."), ({"CPU", "CUDA"}, "for CPU and CUDA.")])
def test_report_with_the_compiled_part(monkeypatch, devices, words):
    monkeypatch.setattr(library, "compiled_error", None)
    monkeypatch.setattr(library, "_compiled_ops", {"kv_write": devices})
    monkeypatch.setattr(library, "_has_kernel", lambda name, device: device in devices)
    report = doctor.report()
    assert f"Compiled part: {words}" in lines_of(report, "Compiled part")[0].replace("built for CPU", "for CPU")
    assert "CPU: compiled C++" in lines_of(report, "kv_write")[0]
    assert doctor.BUILD_COMMAND not in report or torch.cuda.is_available()


def test_report_on_a_gpu_without_the_cuda_part_says_how_to_build_it(monkeypatch):
    class Properties:
        name, total_memory, major, minor = "NVIDIA GeForce RTX 3090", 24 * 2**30, 8, 6

    monkeypatch.setattr(library, "compiled_error", None)
    monkeypatch.setattr(library, "_compiled_ops", {"kv_write": {"CPU"}})
    monkeypatch.setattr(library, "_has_kernel", lambda name, device: device == "CPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    report = doctor.report()
    assert "GPU 0: NVIDIA GeForce RTX 3090, 24 GiB, compute capability 8.6" in report
    assert f"install nvcc 13.0, then in the source folder: {doctor.BUILD_COMMAND}" in report
    assert lines_of(report, "kv_write")[0].endswith(f"CPU: compiled C++, CUDA: {library.DEFAULT}")


@pytest.mark.parametrize("amx, words", [(True, "on AMX"), (False, "without AMX")])
def test_report_names_the_branches_of_the_processor(amx, words, monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert lines_of(doctor.report(), "CPU:") == [
        f"CPU: kernels for AVX512; torch multiplies bf16 {words}, the loss of a bf16 head in float32"
    ]


def test_optional_packages_present_and_absent(monkeypatch):
    present = {"gguf", "datasets", "peft"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in present else None)
    report = doctor.report()
    assert "present" in lines_of(report, "datasets")[0]
    assert "`pip install gguf accelerate`" in lines_of(report, "gguf + accelerate")[0]
    assert "`pip install --no-deps bfcl-eval`" in lines_of(report, "bfcl-eval")[0]
    assert "present" in lines_of(report, "peft")[0] and "pip install 'torchao" in lines_of(report, "torchao")[0]


def test_a_peft_too_old_for_transformers_is_told_with_both_versions(monkeypatch):
    pytest.importorskip("peft")
    assert f"present: --use_peft, LoRA adapters ({version('peft')}, " in lines_of(doctor.report(), "peft")[0]
    monkeypatch.setattr(peft_library, "MIN_PEFT_VERSION", "99.1")
    [line] = lines_of(doctor.report(), "peft")
    assert (
        f"of no use: --use_peft, LoRA adapters need peft 99.1 or newer with transformers {version('transformers')}"
        in line
    )
    assert f"but peft {version('peft')} is installed: pip install 'peft>=99.1'" in line
