"""Facts of ``make gpu``, most useful first: correctness, speed, whole runs, peers, slow checks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch

from bench.gpu import commands, loss, rollout, training
from bench.gpu.machine import nvcc_version
from bench.gpu.runner import Bench, Command, Fact
from bench.loss.providers import Toolx
from toolx_kernels.cli import doctor
from toolx_kernels.ops import library
from toolx_kernels.ops.lm_head import tiles
from toolx_kernels.ops.lm_head.tiles import TritonTile


def facts(bench: Bench) -> Sequence[Fact | Command]:
    """All facts and commands in order; a new measurement is one more line here."""
    toy, gpu = bench.toy, bench.device.type == "cuda"
    chip = torch.cuda.get_device_capability() if gpu else (9, 0)
    table = tiles.triton_tile(chip, 2)
    candidates = [table, *(tile for tile in CANDIDATES if tile != table)] if gpu else []
    found = [
        Fact("compiled part", 3, compiled_part),
        # correctness
        loss.exact(torch.bfloat16),
        loss.exact(torch.float32),
        loss.exact(torch.float16),
        Fact("rollout/exact", 10, rollout.exact),
        commands.tests("tests/every op", 60, commands.EVERY_OP, workers=6, toy=toy, beside="loss/exact bf16"),
        # speed
        *(loss.timed(loss.case(d, frozen=frozen)) for d in (896, 1536) for frozen in (False, True)),
        loss.half_dead(896),
        Fact("loss/waits", 2, loss.waits),
        loss.kernels(896),
        loss.kernels(1536),
        loss.timed(loss.case(4096)),
        loss.timed(loss.case(896, "forward")),
        loss.timed(loss.case(896, n=2048, dtype="float32")),
        loss.timed(loss.case(896, n=65_536), (Toolx,), seconds=5, rounds=3, label="length"),
        *(loss.tile(tile) for tile in candidates),
        Fact("rollout/first call", 8, rollout.first_call),
        rollout.timed(rollout.QWEN_05B, seconds=10),
        Fact("rollout/kernels", 5, rollout.kernels),
        Fact("rollout/prefill", 5, rollout.prefill),
        Fact("rollout/ragged", 10, rollout.ragged),
        training.steps("0.5b", 60),
        Fact("train/kernels", 25, training.kernels),
        # whole runs
        commands.tests("tests/engine", 30, "tests/engine", "tests/rollout", workers=12, toy=toy),
        commands.tests("tests/ops", 60, "tests/ops", workers=12, toy=toy),
        commands.sanitizer("memcheck", 60, toy=toy),
        Fact("train/tiny", 60, training.tiny),
        training.steps("1.5b", 60),
        training.steps("3b", 90),
        rollout.timed(replace(rollout.QWEN_05B, model="qwen2.5-1.5b-shape"), seconds=20),
        # peers
        loss.peers(896),
        loss.peers(1536),
        rollout.peers(rollout.QWEN_05B),
        # slow checks
        commands.sanitizer("racecheck", 90, "--kernel-name-exclude", commands.LIBRARY_KERNELS, toy=toy),
        commands.sanitizer("initcheck", 90, toy=toy),
        commands.tests("tests/train", 150, "tests/train", "tests/models", "tests/evaluate", workers=12, toy=toy),
        commands.tests("tests/toolcall", 60, "tests/toolcall", workers=12, toy=toy),
    ]
    return [fact for fact in found if not (toy and re.search(SAME_AT_TOY_SIZE, fact.name))]


SAME_AT_TOY_SIZE = r"D=1536|D=4096|N=2048|1\.5b|3b$"  # equal to another fact


CANDIDATES = (
    TritonTile(128, 128, 64, 8, 3),
    TritonTile(128, 128, 64, 8, 4),
    TritonTile(128, 128, 64, 4, 3),
    TritonTile(128, 128, 32, 8, 3),
    TritonTile(128, 256, 64, 8, 3),
    TritonTile(128, 256, 64, 8, 4),
    TritonTile(256, 128, 64, 8, 3),
    TritonTile(64, 128, 64, 4, 4),
    TritonTile(64, 256, 64, 4, 4),
)


def compiled_part(bench: Bench) -> dict:
    """The backend of every op; if nvcc is available, the CUDA kernels must be in use."""
    words = next(part for part in doctor.report().split("\n\n") if part.startswith("Compiled part: "))
    in_use = any(each["CUDA"] == library.COMPILED["CUDA"] for each in library.backends().values())
    wrong = bench.device.type == "cuda" and nvcc_version() and not in_use
    return {
        "words": words.partition("\n")[0].removeprefix("Compiled part: "),
        "backends": {op: each["CUDA"] for op, each in sorted(library.backends().items())},
        "failures": [f"the compiled CUDA kernels are not in use: {words}"] if wrong else [],
    }
