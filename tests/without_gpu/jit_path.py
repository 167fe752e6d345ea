"""JIT path of the Triton kernels on a chip that is not present; prints each compiled variant.

    python -m tests.without_gpu.jit_path 90 [CASE ...]

Tensors lie on the CPU. Triton's own JIT compiles each launch to a cubin, exactly the variant that the chip would run. A
launch of the loss is then interpreted, because the host reads results of the first kernels. A case runs with sizes that
reach all its variants, then with other sizes. Each variant is one JSON line with its registers and stack bytes per
thread and its shared bytes per block.

Run without TRITON_INTERPRET: an interpreted kernel cannot be compiled.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, interpreter
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from tests.ops import cases
from tests.ops.attention import cases as attention_cases
from tests.without_gpu import interpreted_bf16
from toolx_kernels import linear_grpo_loss, linear_logprob
from toolx_kernels.loss_config import GRPOLossConfig
from toolx_kernels.ops import advantages
from toolx_kernels.ops.attention import paged_triton
from toolx_kernels.ops.attention.paged_call import PagedCall
from toolx_kernels.ops.lm_head import sampling, sampling_triton, scaling

PROCESSORS = 132  # of an H100
BF16, FP32 = torch.bfloat16, torch.float32


class Chip:
    """Stand-in for Triton's driver."""

    def __init__(self, chip: int):
        self.target = GPUTarget("cuda", chip, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


class Case(NamedTuple):
    """``run(patch, size)`` for ``sizes`` that reach every variant, then for ``others``, which must compile nothing."""

    run: Callable
    sizes: list
    others: list
    interpreted: bool = False


# ---- the loss


def loss(dtype, config, path="chunks", extras=(), kept=(), by_token=False):
    def run(patch, size):
        lengths, vocab, rows = size
        case = cases.make_case(lengths, [0.0, 1.0, 0.5, 0.0], dim=64, vocab=vocab, dtype=dtype, extras=extras)
        if by_token:
            advantages = torch.arange(sum(lengths)) % 3 - 1.0
            case = {name: case[name] for name in case.keys() - {"rewards", "group_size"}} | {"advantages": advantages}
        cases.force(patch, path, rows, vocab)
        cases.run_loss(linear_grpo_loss, cases.without_logprobs(case, *kept), config)

    return Case(run, [((9, 5, 6, 2), 203, 16)], [((1, 0, 0, 0), 130, 7), ((16, 8, 5, 3), 256, 16)], interpreted=True)


def logprobs(dtype):
    def run(patch, size):
        rows, vocab = size
        cases.force(patch, "recompute", 128, vocab)
        cases.run_head(linear_logprob, cases.make_head(rows, 64, vocab, dtype))

    return Case(run, [(143, 203)], [(1, 203), (32, 256)])


def give_advantages(scale):
    def run(patch, completions):
        advantages.in_triton(torch.rand(completions), 4, None, scale, 1e-4, 0.0)

    return Case(run, [12], [4, 16, 2048])


# ---- rollouts


def sample(dtype, sizes, others, **filters):
    def run(patch, rows):
        hidden, weight = torch.randn(rows, 64).to(dtype), torch.randn(1003, 64).to(dtype)
        sampling.sample(hidden, weight, torch.arange(5 * rows).view(rows, 5), **filters)

    return Case(run, sizes, others)


def attend(dtype, heads, dim, sizes, others, window=0, softcap=0.0):
    """``heads`` is (H, Hkv), a size the ``groups`` of ``make_grouped``; groups that share pages have <= 16 queries."""

    def run(patch, groups):
        case = attention_cases.make_grouped(groups, 16, heads=heads[0], kv_heads=heads[1], dim=dim, dtype=dtype)
        shared = groups[0][0] > 0
        sharing = case.sharing.values() if shared else (None, None)
        most = 16 if shared else int(case.tensors[-1].diff().max())
        paged_triton.paged_attention(PagedCall(*case.tensors, *sharing, most, 0.1, softcap, window))

    return Case(run, sizes, others)


def write_keys(dtype):
    def run(patch, tokens):
        key, value = torch.randn(2, tokens, 2, 64).to(dtype)
        pages = torch.zeros(2, 20, 16, 2, 64, dtype=dtype)
        paged_triton.kv_write(key, value, *pages, torch.randperm(320)[:tokens])

    return Case(run, [9], [1, 16, 320])


def decode(*siblings, prompt=1):
    """One group for each number of ``siblings``, whose rows have one query each and share ``prompt`` pages."""
    return [(prompt, [(1 + i, 1) for i in range(n)]) for n in siblings]


def prefill(*lengths):
    """Rows of these lengths that share nothing; all their tokens are queries."""
    return [(0, [(n, n)]) for n in lengths]


ENTROPY = GRPOLossConfig(beta=0.1, entropy_coef=0.1)
EVERY = ("bias", "softcap", "temperature")
OLD, REF, SAMPLER = "old_logprobs", "ref_logprobs", "sampler_logprobs"
# few queries split the keys, many do not
ROWS = [decode(1, prompt=0), decode(*[1] * 140, prompt=0)], [decode(*[1] * n, prompt=0) for n in (2, 16, 33, 160)]
GROUPS = [decode(8, 8)], [decode(16), decode(*[8] * 16), decode(*[5] * 33)]
PROMPTS = [prefill(40), prefill(*[90] * 70)], [prefill(64, 64, 64), prefill(*[20] * 320)]
MANY_PROMPTS = [prefill(*[90] * 70)], [prefill(*[20] * 320)]
CASES = {
    "loss bf16": loss(BF16, GRPOLossConfig()),
    "loss bf16, off-policy": loss(BF16, GRPOLossConfig(), kept=(OLD,)),
    "loss bf16, everything": loss(BF16, ENTROPY, extras=EVERY, kept=(OLD, REF, SAMPLER)),
    "loss bf16, two sweeps, advantages by token": loss(BF16, GRPOLossConfig(), "recompute", by_token=True),
    "loss fp32, everything": loss(FP32, ENTROPY, extras=EVERY, kept=(OLD, REF, SAMPLER)),
    "log-probs bf16": logprobs(BF16),
    "advantages": give_advantages("group"),
    "sample bf16": sample(BF16, [9, 24, 75], [1, 16, 17, 32, 33, 320]),
    "sample bf16, filters": sample(BF16, [75], [33, 320], top_k=5),
    "kv_write bf16": write_keys(BF16),
    "decode bf16 64": attend(BF16, (14, 2), 64, *ROWS),
    "decode bf16 128, groups": attend(BF16, (12, 2), 128, *GROUPS),
    "prefill bf16 128, window, softcap": attend(BF16, (12, 2), 128, *PROMPTS, 40, 5.0),
    "prefill bf16 256, window, softcap": attend(BF16, (14, 2), 256, *MANY_PROMPTS, 40, 5.0),
    "prefill fp32 128, window, softcap": attend(FP32, (12, 2), 128, *MANY_PROMPTS, 40, 5.0),
}


# ---- compiled variants


def resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()
    return {"registers": int(registers), "stack": int(stack)}


def main(chip: int, names: list[str]) -> None:
    interpreted_bf16.install()
    driver.set_active(Chip(chip))
    torch.cuda.get_device_capability = lambda *_: divmod(chip, 10)
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(multi_processor_count=PROCESSORS)
    seen, where = set(), {}
    jit_run = JITFunction.run

    def run(kernel, *arguments, grid, warmup, **options):
        compiled = jit_run(kernel, *arguments, grid=grid, warmup=True, **options)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            used = resources(compiled.asm["cubin"])
            used |= {"shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps}
            print(json.dumps({**where, "kernel": kernel.__name__, **used}), flush=True)
        if case.interpreted:
            interpret(kernel, arguments, grid, options)

    def interpret(kernel, arguments, grid, options):
        # Patch Triton for its library functions here: each call of one would patch it and not undo that for the next
        # compilation.
        library = interpreter._patch_lang(tl.max.fn)
        try:
            InterpretedFunction(kernel.fn).run(*arguments, grid=grid, warmup=False, **options)
        finally:
            library.restore()

    def call(function, *arguments, **named):
        return InterpretedFunction(function.fn).rewrite()(*arguments, **named)

    JITFunction.run, JITFunction.__call__ = run, call
    for name in names or CASES:
        case = CASES[name]
        seen.clear()
        for others in (False, True):
            for size in case.others if others else case.sizes:
                where = {"case": name, "others": others}
                with pytest.MonkeyPatch.context() as patch:
                    cases.use_backend(patch, "triton")
                    patch.setattr(sampling, "kernels", lambda dtype: sampling_triton)
                    patch.setattr(scaling, "on_gpu", lambda factor: True)
                    case.run(patch, size)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("chip", type=int)
    parser.add_argument("cases", nargs="*")
    given = parser.parse_args()
    main(given.chip, given.cases)
