"""Every kernel and default tile, compiled for chips that need not be there: no spills, and no more than they have."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.ops.cross_compile import CHIPS, SHARED_BYTES, kernels

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[int, list[dict]]:
    """What each chip's kernels take of it, by two processes at a time, in which kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))

    def compile_all(chip):
        command = [sys.executable, "-m", "tests.ops.cross_compile", str(chip)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CHIPS, pool.map(compile_all, CHIPS), strict=True))


@pytest.mark.parametrize("chip", CHIPS)
def test_every_kernel_fits(chip, compiled):
    assert {found["kernel"] for found in compiled[chip]} == set(kernels())
    for found in compiled[chip]:
        assert found["spilled"] == 0, f"sm_{chip}: {found}"
        assert 0 < found["registers"] <= 255
        assert found["shared"] <= SHARED_BYTES[chip], f"sm_{chip}: {found}"


@pytest.mark.parametrize("name", ["reweigh_kernel", "move_rows_kernel"])
def test_passes_over_a_row_move_16_bytes_at_a_time(name, compiled):
    """What a mask of unknown alignment prevents."""
    for chip, kernels_of_chip in compiled.items():
        for found in kernels_of_chip:
            if found["kernel"] == name:
                assert ["ld", 128] in found["moves"], f"sm_{chip}: {found}"
                assert [kind for kind in found["moves"] if kind[0] == "st"] == [["st", 128]], f"sm_{chip}: {found}"


def test_two_programs_of_the_sweep_share_a_processor(compiled):
    """An H100's holds 65,536 registers and 228 KiB of shared memory; one program's epilogue hides behind the other."""
    (found,) = (found for found in compiled[90] if found["what"] == "sweep exponentials, plain bf16")
    assert found["registers"] * 256 <= 65_536 // 2
    assert found["shared"] + 1024 <= (228 << 10) // 2
