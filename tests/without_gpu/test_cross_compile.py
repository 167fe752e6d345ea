"""``cross_compile``: kernels with default tiles neither spill nor exceed a chip, for chips that are not present."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.without_gpu.cross_compile import CHIPS, LEAST, SHARED_BYTES, kernels
from toolx_kernels.ops.attention import paged_tiles
from toolx_kernels.ops.lm_head import tiles

ROOT = Path(__file__).parents[2]


def compile_for(*arguments) -> list[dict]:
    """Resources that the kernels take, from a process in which they are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.without_gpu.cross_compile", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_fits(compiled):
    for found in compiled:
        assert found["stack"] == 0, f"spills: {found}"
        assert 0 < found["registers"] <= 255
        assert found["shared"] <= SHARED_BYTES[found["chip"]], found


@pytest.fixture(scope="module")
def on_least():
    return compile_for(LEAST)


def test_every_kernel_fits_the_chip_with_least_to_spare(on_least):
    assert {found["kernel"] for found in on_least} == set(kernels())
    assert_fits(on_least)


def test_sm_89_takes_the_tiles_of_sm_86():
    """sm_89 has the instructions, registers and shared memory of sm_86, for which the kernels are compiled here."""
    assert all(tiles.TRITON_TILES[89, size] == tiles.TRITON_TILES[86, size] for size in (2, 4))
    assert not {chip for chip, *_ in paged_tiles.TILES_OF_CHIP} & {86, 89}


@pytest.mark.parametrize("name", ["reweigh_kernel", "move_rows_kernel"])
def test_passes_over_a_row_move_16_bytes_at_a_time(name, on_least):
    """A mask of unknown alignment would prevent it."""
    for found in on_least:
        if found["kernel"] == name:
            assert ["ld", 128] in found["moves"], found
            assert [kind for kind in found["moves"] if kind[0] == "st"] == [["st", 128]], found


@pytest.mark.soak
@pytest.mark.parametrize("chip", CHIPS)
def test_every_form_of_every_kernel_fits_every_chip(chip):
    compiled = compile_for("--every", chip)
    assert {found["kernel"] for found in compiled} == set(kernels())
    assert_fits(compiled)
