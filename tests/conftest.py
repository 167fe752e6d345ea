"""Settings of the test process that must be made before torch or triton is imported."""

import importlib.util
import os

# Spinning OpenMP threads slow every other process on a small machine several times.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"
# Each worker of pytest-xdist has one core, which the processes that it starts share.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton"):
        from tests.without_gpu import interpreted_bf16, interpreted_once

        interpreted_bf16.install()
        interpreted_once.install()
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

try:
    from hypothesis import settings
except ModuleNotFoundError:  # a GPU machine may lack it: tests that need it then report that
    pass
else:
    # A busy machine must not fail a test, and a failure must be reproducible.
    settings.register_profile("repeatable", deadline=None, derandomize=True)
    settings.load_profile("repeatable")
