"""Cases and helpers shared by the loss tests: inputs, forced paths, and comparisons of our error with torch's."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from toolx_kernels import reference
from toolx_kernels.ops.lm_head import live_rows, sweep, sweep_torch, tiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS = (5, 1, 9, 4, 0, 3, 7, 2)  # completions of two groups of four; one is empty
N = sum(LENGTHS)
REWARDS = (1.0, 0.0, 0.0, 1.0, 1.0, 0.2, 0.0, 1.0)
DEAD_GROUP = (1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.0, 1.0)  # the first group has zero advantages
EXTRAS = ("bias", "softcap", "temperature")
LEAVES = ("hidden", "weight", "bias")
TRITON_DTYPES = [torch.float32, torch.float16, torch.bfloat16]

try:
    from toolx_kernels.ops.lm_head import sweep_triton
except ImportError:
    sweep_triton = None
needs_triton = pytest.mark.skipif(sweep_triton is None, reason="triton is not installed")
BACKENDS = ["torch", pytest.param("triton", marks=needs_triton)]


def use_backend(monkeypatch, name: str) -> None:
    """Runs every sweep in this backend; without a GPU, Triton runs in the interpreter."""
    backend = {"torch": sweep_torch, "triton": sweep_triton}[name]
    monkeypatch.setattr(sweep, "backend", lambda _: backend)
    monkeypatch.setattr(live_rows, "finder", lambda *_: getattr(live_rows, f"in_{name}"))


def make_head(n=N, dim=24, vocab=213, dtype=torch.float32, extras=(), seed=0, spread=1.5) -> dict:
    """Arguments of ``linear_logprob``: hidden (n, dim), weight (vocab, dim), targets (n), and the named extras.

    Logits have a standard deviation of about ``spread``. The last target is the last token of the vocabulary.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    floats = {"hidden": normal(n, dim), "weight": normal(vocab, dim) * spread / dim**0.5}
    if "bias" in extras:
        floats["bias"] = normal(vocab)
    case = {name: value.to(DEVICE, dtype) for name, value in floats.items()}
    targets = torch.randint(vocab, (n,), generator=g)
    targets[-1:] = vocab - 1
    case["targets"] = targets.to(DEVICE)
    if "softcap" in extras:
        case["softcap"] = 4.0
    if "temperature" in extras:
        case["temperature"] = (torch.rand(n, generator=g) + 0.5).to(DEVICE)
    return case


def make_case(lengths=LENGTHS, rewards=REWARDS, noise=0.3, masked=(), seed=0, **head) -> dict:
    """Arguments of ``linear_grpo_loss``; other policies' log-probs differ from the own ones by a std of ``noise``."""
    n = sum(lengths)
    case = make_head(n, seed=seed, **head)
    g = torch.Generator().manual_seed(seed + 1)
    own = reference.linear_logprob(**double(case)).logprobs
    for name in ("old_logprobs", "ref_logprobs", "sampler_logprobs"):
        case[name] = (own + noise * torch.randn(n, generator=g).to(DEVICE)).to(reference.compute_dtype(case["hidden"]))
    case["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    case["rewards"] = torch.tensor(rewards, dtype=reference.compute_dtype(case["hidden"]), device=DEVICE)
    case["group_size"] = 4
    case["mask"] = torch.ones(n, dtype=torch.bool, device=DEVICE)
    case["mask"][list(masked)] = False
    return case


def without_logprobs(case: dict, *kept: str) -> dict:
    """The case without the other policies' log-probs, except those in ``kept``."""
    return {name: value for name, value in case.items() if not name.endswith("_logprobs") or name in kept}


def double(case: dict) -> dict:
    floating = {k: v for k, v in case.items() if torch.is_tensor(v) and v.is_floating_point()}
    return case | {name: value.detach().double() for name, value in floating.items()}


def with_leaves(case: dict, frozen=()) -> tuple[dict, dict]:
    """The case with fresh leaves, and the leaves that need a gradient."""
    leaves = {name: case[name].detach().clone() for name in LEAVES if name in case}
    trained = {name: leaf.requires_grad_() for name, leaf in leaves.items() if name not in frozen}
    return case | leaves, trained


def run_loss(function, case: dict, config, frozen=(), upstream=1.0):
    """The output and the gradients of all leaves that are not frozen."""
    arguments, leaves = with_leaves(case, frozen)
    output = function(**arguments, config=config)
    return output, dict(zip(leaves, torch.autograd.grad(output.loss * upstream, leaves.values()), strict=True))


def run_head(function, case: dict, frozen=(), entropy=True):
    """The statistics and the gradients; upstream gradients differ between rows and between outputs."""
    arguments, leaves = with_leaves(case, frozen)
    stats = function(**arguments, entropy=entropy)
    n = len(case["targets"])
    upstream = [torch.linspace(-1, 2, n), torch.linspace(0.5, -1, n), torch.linspace(1, -0.5, n) ** 2]
    loss = sum((out * up.to(out)).sum() for out, up in zip(stats, upstream, strict=True) if out is not None)
    return stats, dict(zip(leaves, torch.autograd.grad(loss, leaves.values()), strict=True))


def _logits_as_written(hidden, weight, temperature=1.0, bias=None, softcap=None):
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits.to(reference.compute_dtype(hidden))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / (temperature.to(logits)[:, None] if torch.is_tensor(temperature) else temperature)


@contextmanager
def as_written():
    """Makes the reference multiply in the head's own dtype, as plain code does: ``(hidden @ weight.T).float()``."""
    with mock.patch.object(reference, "linear_logits", _logits_as_written):
        yield


def error(value, truth) -> float:
    """Norm of the error, relative to the norm of ``truth``."""
    return float((value.detach().double() - truth.detach()).norm() / truth.detach().norm().clamp(min=1e-30))


def assert_as_good(mine: dict, theirs: dict, truth: dict, tolerance: float) -> None:
    """Asserts ``|ours - truth| <= |torch's - truth| + tolerance``, in relative norms, for every entry."""
    for name, true in truth.items():
        if true is not None:
            ours, torchs = error(mine[name], true), error(theirs[name], true)
            assert ours <= torchs + tolerance, f"{name}: {ours:.2e}, torch's {torchs:.2e}"


def assert_equal_gradients(actual: dict, expected: dict, rtol=1e-9) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert error(actual[name], value.double()) <= rtol, name


def assert_agrees(ours, truth, tolerance=1e-9) -> None:
    """Asserts that loss, log-probs, entropy and stats of two ``GRPOOutput`` agree."""
    near = {"rtol": tolerance, "atol": tolerance, "equal_nan": True, "check_dtype": False}
    for name in ("loss", "logprobs", "entropy"):
        torch.testing.assert_close(getattr(ours, name), getattr(truth, name), **near, msg=lambda m, n=name: f"{n}: {m}")
    assert ours.stats.keys() == truth.stats.keys()
    for name, value in truth.stats.items():
        torch.testing.assert_close(ours.stats[name], value, **near, msg=lambda m, n=name: f"{n}: {m}")


# ---- paths

PATHS = ("one chunk", "chunks", "recompute", "deferred")


def force(monkeypatch, path: str, rows=7, columns=50, gemm_dtype=None) -> None:
    """Forces small blocks, and a single sweep only where ``path`` is one; the config selects "deferred".

    With ``gemm_dtype``, products take that dtype and sum in fp32, as on a GPU.
    """

    def plan(n_rows, vocab, dim, device, dtype=torch.float32, workspace_mib=None):
        stored, multiplied = tiles.gemm_dtypes(device, dtype)
        return tiles.SweepSize(rows, columns, stored, gemm_dtype or multiplied)

    def single(n_rows, *arguments, **_):
        if path == "one chunk":
            return plan(n_rows, *arguments)._replace(rows=max(n_rows, 1))
        return plan(n_rows, *arguments) if path == "chunks" else None

    def addmm(total, left, right, *, beta, out_dtype, out):
        product = left.to(out_dtype) @ right.to(out_dtype)
        return out.copy_(product + total if beta else product)

    if gemm_dtype is not None and DEVICE.type == "cpu":  # torch has no such product on a CPU
        monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(tiles, "single_sweep_size", single)
    monkeypatch.setattr(tiles, "recompute_size", plan)
    monkeypatch.setattr(tiles, "forward_size", lambda n, vocab, dim, device, **_: plan(n, vocab, dim, device))
