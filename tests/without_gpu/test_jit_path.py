"""``jit_path``: the kernel variants that a run compiles with Triton's own JIT for chips that are not present."""

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
SHARED_BYTES = {89: 99 << 10, 90: 227 << 10}  # limit of a block

ROWS = {"survey_kernel": 1, "place_rows_kernel": 1, "scale_kernel": 1}  # in every form of the loss
LOGPROBS = {"target_logits_kernel": 1, "sweep_kernel": 2, "add_online_kernel": 1, "place_targets_kernel": 1}
SINGLE = {"target_logits_kernel": 1, "sweep_kernel": 1, "place_targets_kernel": 1, "statistics_kernel": 1}
LOSS = ROWS | SINGLE | {"finish_rows_kernel": 1}
# scale_kernel: the bias has any number of elements, other gradients a multiple of 16
EVERYTHING = LOSS | {"reweigh_kernel": 1, "scale_kernel": 2}
SAMPLE = {"sample_kernel": 1, "join_samples_kernel": 1}
# attention: one variant for split keys or a group's prefix, one for unsplit keys or the part behind the prefix
ATTENTION = {"attention_kernel": 2, "merge_kernel": 1}
EXPECTED = {
    "loss bf16": LOSS,
    "loss bf16, off-policy": LOSS | {"move_rows_kernel": 1},
    "loss bf16, everything": EVERYTHING,
    "loss bf16, two sweeps, advantages by token": ROWS | LOGPROBS,
    "loss fp32, everything": EVERYTHING,
    "log-probs bf16": LOGPROBS,
    "advantages": {"advantages_kernel": 1},
    "sample bf16": SAMPLE | {"sample_kernel": 3},  # up to 16, up to 32, and more rows
    "sample bf16, filters": SAMPLE | {"add_gumbel_kernel": 1},
    "kv_write bf16": {"kv_write_kernel": 1},
    "decode bf16 64": ATTENTION,
    "decode bf16 128, groups": ATTENTION,
    "prefill bf16 128, window, softcap": ATTENTION,
    "prefill bf16 256, window, softcap": {"attention_kernel": 1},
    "prefill fp32 128, window, softcap": {"attention_kernel": 1},
}
# sm_89 uses the tiles of sm_86, which test_cross_compile compiles
ON_CHIP = {90: list(EXPECTED), 89: ["loss bf16", "decode bf16 128, groups"]}


def programs_on_a_processor(found: dict) -> int:
    """Programs that fit a processor of an H100: it has 65,536 registers, allocated in multiples of 8 per thread, and
    228 KiB of shared memory, of which each program takes 1 KiB more than it requests."""
    registers = 32 * found["warps"] * -(-found["registers"] // 8) * 8
    return min(65536 // registers, (228 << 10) // (found["shared"] + 1024))


@pytest.mark.parametrize("chip", ON_CHIP)
def test_what_a_run_compiles(chip):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # tensors lie on the CPU
    command = [sys.executable, "-m", "tests.without_gpu.jit_path", str(chip), *ON_CHIP[chip]]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = defaultdict(Counter)
    for line in done.stdout.splitlines():
        found = json.loads(line)
        compiled[found["case"]][found["kernel"]] += 1
        assert not found["others"], f"another number of rows, or other lengths, compiled {found}"
        assert found["stack"] == 0, f"spills: {found}"
        assert found["shared"] <= SHARED_BYTES[chip], found
        if (chip, found["kernel"]) == (90, "sweep_kernel") and found["case"] in ("loss bf16", "loss bf16, off-policy"):
            assert programs_on_a_processor(found) >= 2, f"one hides what the other waits for: {found}"
    assert compiled == {name: EXPECTED[name] for name in ON_CHIP[chip]}
