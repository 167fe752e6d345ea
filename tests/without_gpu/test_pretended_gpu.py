"""Code for a GPU on the pretended one (``pretended_gpu``), in separate processes because torch is patched there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("name", ["pretended_gpu_loss_checks.py", "pretended_gpu_checks.py"])
def test_what_runs_on_a_gpu(name):
    checks = Path(__file__).with_name(name)
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "tests.without_gpu.pretended_gpu"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", *options, checks]
    done = subprocess.run(command, cwd=checks.parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
