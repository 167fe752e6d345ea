"""Loss facts on a GPU: errors, time compared with the bare GEMMs, memory, and time by kernel."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.common import timing
from bench.gpu.machine import median_seconds
from bench.gpu.runner import Bench, Fact
from bench.loss.cases import Case, make_problem
from bench.loss.measure import measure
from bench.loss.providers import PEERS, Floor, LiveFloor, LossProvider, PlainTorch, Toolx
from toolx_kernels import linear_grpo_loss, linear_logprob, reference
from toolx_kernels.loss_config import GRPOLossConfig
from toolx_kernels.ops.lm_head import tiles
from toolx_kernels.ops.lm_head.head import Head
from toolx_kernels.ops.lm_head.tiles import TritonTile

VOCAB = 151_936  # Qwen2.5's
# Largest error of a log-prob; relative (Frobenius) error of a gradient. 16-bit gradients are rounded once on their way
# through the workspace and once at the end.
TOLERANCE = {torch.float32: (1e-4, 2e-5), torch.bfloat16: (1e-3, 4e-3), torch.float16: (1e-3, 4e-3)}
FORMS = (
    "on-policy",
    "frozen head",
    "clipped, with KL",
    "entropy bonus, softcap, bias",
    "temperature by row, mask, dead",
    "whole sequences",
    "advantages by token",
)


def exact(dtype: torch.dtype) -> Fact:
    """Compares every form of the loss and its gradients with float64, and two runs bit by bit."""

    def find(bench: Bench) -> dict:
        logprob_tolerance, gradient_tolerance = TOLERANCE[dtype]
        found, failures = {}, []
        for form in FORMS:
            leaves, options = form_of(form, dtype, bench)
            mine, again = (run(linear_grpo_loss, leaves, options) for _ in range(2))
            true = run(reference.linear_grpo_loss, *in_double(leaves, options))
            live = ~mine["logprobs"].isnan()
            errors = {"logprob": float((mine["logprobs"] - true["logprobs"])[live].abs().max())}
            errors |= {name: relative(mine[name], true[name]) for name in leaves if leaves[name].requires_grad}
            failures += [
                f"{form}: {name} is off by {error:.2g}"
                for name, error in errors.items()
                if not error <= (logprob_tolerance if name == "logprob" else gradient_tolerance)
            ]
            if any(not torch.equal(mine[name].nan_to_num(), again[name].nan_to_num()) for name in mine):
                failures.append(f"{form}: two runs differ")
            found[form] = {name: float(f"{error:.3g}") for name, error in errors.items()}
        worst = {kind: max(found[form].get(kind, 0.0) for form in FORMS) for kind in ("logprob", "hidden", "weight")}
        return worst | {"forms": found, "failures": failures}

    return Fact(f"loss/exact {name_of(dtype)}", 20, find)


def form_of(form: str, dtype: torch.dtype, bench: Bench) -> tuple[dict[str, Tensor], dict]:
    """Leaves in ``dtype``, and the other arguments of ``linear_grpo_loss``: two groups of five completions."""
    n, d, vocab = (40, 32, 300) if bench.toy else (1000, 896, 20_011)
    g = torch.Generator(bench.device).manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g, device=bench.device)

    leaves = {"hidden": randn(n, d), "weight": randn(vocab, d) * 4 / d**0.5}
    targets = torch.randint(vocab, (n,), generator=g, device=bench.device)
    options: dict = {
        "targets": targets,
        "cu_seqlens": torch.arange(0, n + 1, n // 10, dtype=torch.int32, device=bench.device),
        "advantages": randn(10),
    }
    if form == "entropy bonus, softcap, bias":
        leaves["bias"] = randn(vocab)
        options |= {"softcap": 20.0, "config": GRPOLossConfig(entropy_coef=0.01)}
    if form == "temperature by row, mask, dead":
        options["temperature"] = torch.linspace(0.6, 1.4, n, device=bench.device)
        options["mask"] = torch.rand(n, generator=g, device=bench.device) > 0.3
        options["advantages"][:5] = 0
    if form == "advantages by token":
        options["advantages"] = randn(n)
        options["advantages"][::3] = 0
    leaves = {name: leaf.to(dtype).requires_grad_() for name, leaf in leaves.items()}
    if form == "frozen head":
        leaves["weight"].requires_grad_(False)
    if form in ("clipped, with KL", "whole sequences"):
        with torch.no_grad():
            now = linear_logprob(leaves["hidden"], leaves["weight"], targets).logprobs
        # 0.05 away from the bounds of the clip, so that rounding decides nothing
        options["old_logprobs"] = now + 0.1 * torch.randint(-4, 5, (n,), generator=g, device=bench.device) + 0.05
        options["ref_logprobs"] = now + 0.2 * randn(n)
        level = "sequence" if form == "whole sequences" else "token"
        options["config"] = GRPOLossConfig(beta=0.04, importance_sampling_level=level)
    return leaves, options


def in_double(leaves: dict[str, Tensor], options: dict) -> tuple[dict[str, Tensor], dict]:
    def wide(value):
        return value.double() if torch.is_tensor(value) and value.is_floating_point() else value

    exact = {name: leaf.detach().double().requires_grad_(leaf.requires_grad) for name, leaf in leaves.items()}
    return exact, {name: wide(value) for name, value in options.items()}


def run(loss, leaves: dict[str, Tensor], options: dict) -> dict[str, Tensor]:
    """Log-probs and the gradients of the leaves that require one."""
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    out = loss(**leaves, **options)
    return {"logprobs": out.logprobs} | dict(zip(wanted, torch.autograd.grad(out.loss, wanted.values()), strict=True))


def relative(mine: Tensor, true: Tensor) -> float:
    return float((mine.double() - true).norm() / true.norm())


def name_of(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def case(d: int, what: str = "both", n: int = 8192, **others) -> Case:
    return Case(what, n, d, VOCAB, **others)


def timed(
    case: Case,
    kinds: Sequence[type[LossProvider]] = (Toolx, Floor),
    *,
    seconds: float = 3,
    rounds: int = 10,
    label: str = "time",
) -> Fact:
    """Medians over rounds in which all providers take turns, and our memory beyond inputs and gradients."""
    head = "frozen" if case.frozen else f"{case.dead:.0%} dead" if case.dead else "trained"
    passes = "" if case.what == "both" else f" {case.what}"
    n = "" if case.n == 8192 else f" N={case.n}"
    dtype = " fp32" if case.dtype == "float32" else ""

    def find(bench: Bench) -> dict:
        its_case = replace(case, n=64, d=32, v=500) if bench.toy else case
        chosen = [kind for kind in kinds if not (bench.toy and kind in PEERS)]
        records = measure(its_case, chosen, bench.device, 2 if bench.toy else rounds)["records"]
        by_name = {record["provider"]: record for record in records}
        ours, floor = by_name[Toolx.name], by_name.get(Floor.name)
        found = {"ms": ours["ms"], "fastest_ms": min(ours["rounds_ms"])}
        if floor is not None:
            found |= {"floor_ms": floor["ms"], "to_floor": round(ours["ms"] / floor["ms"], 3)}
        if "mib_beyond_gradients" in ours:
            found["mib_beyond_gradients"] = ours["mib_beyond_gradients"]
            found["workspace_mib"] = tiles.workspace_bytes(bench.device, its_case.n, its_case.v) >> 20
        others = [record for name, record in by_name.items() if name not in (Toolx.name, Floor.name)]
        wrong = [f"{name} is off by {error:.2g}" for name, error in ours["errors"].items()] if ours["wrong"] else []
        return found | ({"others": others} if others else {}) | {"failures": wrong}

    return Fact(f"loss/{label} D={case.d}{n}{dtype} {head}{passes}", seconds, find)


def peers(d: int) -> Fact:
    return timed(case(d), (Toolx, Floor, PlainTorch, *PEERS), label="peers", seconds=15, rounds=5)


def half_dead(d: int) -> Fact:
    return timed(case(d, dead=0.5), (Toolx, Floor, LiveFloor))


def kernels(d: int) -> Fact:
    """The time of one call, kernel by kernel, and its time without a kernel."""

    def find(bench: Bench) -> dict:
        n, d_, vocab = (64, 32, 500) if bench.toy else (8192, d, VOCAB)
        problem = make_problem(n, d_, vocab, dtype=torch.bfloat16, device=bench.device)
        provider = Toolx(bench.device)
        provider.stage("both", problem)()
        return profiled(provider.stage("both", problem), bench)

    return Fact(f"loss/kernels D={d}", 2, find)


def profiled(call: Callable[[], object], bench: Bench, listed: int = 16) -> dict:
    cuda = bench.device.type == "cuda"
    timing.seconds(call, bench.device)
    wall = timing.seconds(call, bench.device)
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as trace:
        call()
        timing.synchronize(bench.device)

    def busy(event) -> float:
        return (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3

    events = sorted(trace.key_averages(), key=busy, reverse=True)
    return {
        "wall_ms": round(1e3 * wall, 3),
        "busy_ms": round(sum(map(busy, events)), 3),
        "launches": sum(event.count for event in events),
        "kernels": [(event.key[:70], event.count, round(busy(event), 4)) for event in events[:listed]],
    }


def waits(bench: Bench) -> dict:
    """Counts how often a call, forward and backward, waits for the device; torch does not report waits for events."""
    n, d, vocab = (64, 32, 500) if bench.toy else (2048, 896, VOCAB)
    call = Toolx(bench.device).stage("both", make_problem(n, d, vocab, dtype=torch.bfloat16, device=bench.device))
    with counted_waits(bench) as seen:
        call()
    return {"waits": len(seen), "places": seen}


@contextmanager
def counted_waits(bench: Bench) -> Iterator[list[str]]:
    """Collects the places in the block that wait for the device; none on a CPU."""
    seen: list[str] = []
    if bench.device.type != "cuda":
        yield seen
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield seen
    finally:
        torch.cuda.set_sync_debug_mode(before)
    seen += [f"{w.filename.rpartition('/')[2]}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


def tile(shape: TritonTile, d: int = 896) -> Fact:
    """Times the sweep of a chunk with one tile against a plain GEMM of its shape; checks its sums with plain torch."""

    def find(bench: Bench) -> dict:
        from toolx_kernels.ops.lm_head import sweep_triton

        chip = torch.cuda.get_device_capability()
        n, vocab, device = 2816, VOCAB, bench.device
        g = torch.Generator(device).manual_seed(0)
        hidden = torch.randn(n, d, generator=g, device=device).bfloat16()
        weight = (torch.randn(vocab, d, generator=g, device=device) * (4 / d**0.5)).bfloat16()
        head = Head(hidden, weight, torch.zeros(n, dtype=torch.int64, device=device), torch.ones(n, device=device))
        space = sweep_triton.workspace(n, vocab, hidden, torch.bfloat16)
        target, anchor = torch.mv(hidden, weight[0]).float(), torch.full((n,), 12.0, device=device)

        def sweep():
            return sweep_triton.exponentials(head, target, anchor, space, None)

        with mock.patch.dict(tiles.TRITON_TILES, {(chip[0] * 10 + chip[1], 2): shape}):
            sums, ms = sweep()[0].sum(0), 1e3 * median_seconds(sweep, bench)
        true = torch.stack([(rows.float() @ weight.float().T - 12).exp().sum(1) for rows in hidden.split(256)]).view(-1)
        off = float(((sums - true) / true).abs().max())
        gemm = 1e3 * median_seconds(lambda: torch.mm(hidden, weight.T, out=space[:n, :vocab]), bench)
        found = {"ms": round(ms, 4), "tflops": round(2e-9 * n * d * vocab / ms, 1), "gemm_ms": round(gemm, 4)}
        wrong = [] if off < 1e-3 else [f"sums are off by {off:.2g}"]
        return found | {"to_gemm": round(ms / gemm, 3), "off": off, "failures": wrong}

    return Fact("loss/tile " + "x".join(map(str, shape[:3])) + f" w{shape.warps} s{shape.stages}", 3, find)
