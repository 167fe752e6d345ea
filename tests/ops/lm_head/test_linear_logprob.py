"""``linear_logprob`` against the float64 definition."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.ops.cases import (
    DEVICE,
    EXTRAS,
    as_written,
    assert_as_good,
    assert_equal_gradients,
    double,
    error,
    force,
    make_head,
    run_head,
)
from toolx_kernels import reference
from toolx_kernels.errors import InputError
from toolx_kernels.ops.lm_head import linear_logprob as module
from toolx_kernels.ops.lm_head import sweep, tiles
from toolx_kernels.ops.lm_head.linear_logprob import linear_logprob

SHAPES = [(1, 8, 5), (7, 16, 64), (33, 24, 1013), (64, 32, 512), (5, 3, 2)]  # N, D, V: aligned, ragged, odd

# 16-bit gradients are rounded at the end; with few numbers, whose rounding is closer is chance.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-4, torch.bfloat16: 2e-3}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Forces several row blocks and vocabulary tiles even at test sizes."""
    force(monkeypatch, "recompute", rows=7, columns=50)


@pytest.mark.parametrize("extras", [(), EXTRAS], ids=["plain", "extras"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_torch_in_the_same_dtype(shape, dtype, extras):
    case = make_head(*shape, dtype, extras)
    truth, exact = run_head(reference.linear_logprob, double(case))
    with as_written():
        theirs, theirs_grads = run_head(reference.linear_logprob, case)
    ours, grads = run_head(linear_logprob, case)
    tolerance = TOLERANCE[dtype]
    assert all(stat.dtype == reference.compute_dtype(case["hidden"]) for stat in ours)
    assert all(grads[name].dtype == dtype for name in grads)
    assert_as_good(grads, theirs_grads, exact, tolerance)
    assert_as_good(ours._asdict(), theirs._asdict(), truth._asdict(), min(tolerance, 2e-6))
    with torch.no_grad():
        alone = linear_logprob(**case, entropy=True)
    assert all(torch.equal(a, b) for a, b in zip(alone, ours, strict=True))


def test_log_probs_are_exact_in_fp32(monkeypatch):
    """Within 1e-5, or the error of a plain fp32 GEMM, with logits up to 30 and the library's own block sizes."""
    monkeypatch.undo()
    case = make_head(64, 576, 12_289, spread=6.0)
    case["weight"] *= 30 / reference.linear_logits(case["hidden"], case["weight"]).abs().max()
    truth = reference.linear_logprob(**double(case), entropy=True)
    plain = reference.linear_logprob(**case, entropy=True)
    ours = linear_logprob(**case, entropy=True)
    for mine, theirs, true in zip(ours, plain, truth, strict=True):
        off = (mine - true).abs()
        assert off.max() <= max(1e-5, (theirs - true).abs().max()) and off.square().mean().sqrt() <= 5e-6


def test_without_entropy_the_rest_is_the_same():
    case = make_head(33, 24, 1013, torch.float64, EXTRAS)
    truth, exact = run_head(reference.linear_logprob, case, entropy=False)
    ours, grads = run_head(linear_logprob, case, entropy=False)
    assert ours.entropy is None
    torch.testing.assert_close(ours[:2], truth[:2], rtol=1e-12, atol=1e-12)
    assert_equal_gradients(grads, exact)


@pytest.mark.parametrize("used", ["logprobs", "lse", "entropy"])
def test_each_output_alone_carries_its_gradient(used):
    case = make_head(9, 16, 64, torch.float64, EXTRAS)
    names = ("hidden", "weight", "bias")
    grads = []
    for function in (linear_logprob, reference.linear_logprob):
        leaves = {name: case[name].clone().requires_grad_() for name in names}
        out = getattr(function(**case | leaves, entropy=True), used)
        upstream = torch.linspace(-1, 2, 9, dtype=torch.float64, device=DEVICE)
        grads.append(dict(zip(names, torch.autograd.grad((out * upstream).sum(), leaves.values()), strict=True)))
    assert_equal_gradients(*grads)


def test_a_token_excluded_by_an_infinite_bias():
    case = make_head(9, 16, 64, torch.float64)
    case["bias"] = torch.zeros(64, dtype=torch.float64, device=DEVICE)
    case["bias"][10:20] = -torch.inf
    case["targets"] = torch.arange(9, device=DEVICE)
    truth, exact = run_head(reference.linear_logprob, case)
    ours, grads = run_head(linear_logprob, case)
    torch.testing.assert_close(tuple(ours), tuple(truth))
    assert_equal_gradients(grads, exact)


def test_rows_without_upstream_gradient_are_left_out(monkeypatch):
    case = make_head(33, 24, 1013, torch.float64)
    rows = []
    original = module.recompute_gradients
    monkeypatch.setattr(
        module, "recompute_gradients", lambda head, *a: rows.append(len(head.hidden)) or original(head, *a)
    )
    grads = []
    for function in (linear_logprob, reference.linear_logprob):
        leaves = {name: case[name].clone().requires_grad_() for name in ("hidden", "weight")}
        upstream = torch.zeros(33, dtype=torch.float64, device=DEVICE)
        upstream[[3, 17, 30]] = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, device=DEVICE)
        loss = (function(**case | leaves).logprobs * upstream).sum()
        grads.append(dict(zip(leaves, torch.autograd.grad(loss, leaves.values()), strict=True)))
    assert_equal_gradients(*grads)
    assert (grads[0]["hidden"][[0, 1, 2]] == 0).all()
    assert rows == [3]


def test_no_rows():
    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    stats = linear_logprob(hidden, weight, torch.zeros(0, dtype=torch.int64), entropy=True)
    stats.logprobs.sum().backward()
    assert stats.lse.shape == (0,) and (weight.grad == 0).all()


def test_memory_that_nobody_wrote_is_not_read(poisoned):
    case = make_head(33, 24, 213, torch.float32, EXTRAS)
    truth, exact = run_head(reference.linear_logprob, double(case))
    ours, grads = run_head(linear_logprob, case)
    for mine, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-5)
    assert_equal_gradients(grads, exact, 1e-5)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the bound of a GPU is 512 MiB, which small shapes do not reach")
@pytest.mark.parametrize("entropy", [False, True])
def test_memory_stays_within_the_workspace_whatever_n_is(entropy, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(tiles, "CPU_WORKSPACE_BYTES", 2 << 20)
    vocab, dim = 6000, 16
    for n in (1024, 2048):
        hidden, weight = torch.randn(n, dim, requires_grad=True), torch.randn(vocab, dim, requires_grad=True)
        targets = torch.randint(vocab, (n,))
        with torch.profiler.profile(profile_memory=True) as profile:
            stats = linear_logprob(hidden, weight, targets, entropy=entropy)
            (stats.entropy if entropy else stats.logprobs).sum().backward()
        held = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        results = (2 * n + 2 * vocab) * dim * 4
        assert peak <= results + 32 * 4 * n + (2 << 20), (n, peak / 2**20)


def test_the_ops_are_registered_properly():
    case = make_head(7, 16, 64, torch.float64, EXTRAS)
    hidden, weight, bias = (case[name].clone().requires_grad_() for name in ("hidden", "weight", "bias"))
    arguments = (hidden, weight, case["targets"], case["temperature"], bias, 3.0, -1, True)
    torch.library.opcheck(torch.ops.toolx.linear_logprob.default, arguments)
    torch.library.opcheck(torch.ops.toolx.linear_logprob.default, (*arguments[:7], False))
    head = [a.detach() if torch.is_tensor(a) else a for a in arguments[:7]]
    logprobs, lse, entropy = torch.ops.toolx.linear_logprob(*head, True)
    for needs in ([True] * 3, [False, True, False]):
        backward = (*head, logprobs, lse, entropy, logprobs, lse, entropy, needs)
        torch.library.opcheck(torch.ops.toolx.linear_logprob_backward.default, backward)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.soak)])
def test_under_compile_with_changing_lengths(backend):
    """One graph, not recompiled for new lengths."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def loss(hidden, weight, targets):
        stats = linear_logprob(hidden * 1.5, weight, targets, entropy=True)
        return (stats.logprobs - 0.3 * stats.entropy).sum()

    compiled = torch.compile(loss, backend=backend, fullgraph=True, dynamic=True)
    for n in (3, 8, 13):
        case = make_head(n, 16, 64)
        grads = []
        for function in (loss, compiled):
            leaves = [case[name].clone().requires_grad_() for name in ("hidden", "weight")]
            grads.append(torch.autograd.grad(function(*leaves, case["targets"]), leaves))
        torch.testing.assert_close(*grads)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiled_backward_of_transposed_hidden():
    case = make_head(7, 16, 64)
    strided = case["hidden"].T.contiguous().requires_grad_()

    def loss(hidden_t):
        return linear_logprob((hidden_t * 1.5).T, case["weight"], case["targets"]).logprobs.sum()

    (expected,) = torch.autograd.grad(loss(strided), strided)
    (actual,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(strided), strided)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant):
    case = make_head(7, 16, 64, torch.float64)

    def loss(hidden, weight):
        return linear_logprob(hidden * 1.5, weight, case["targets"]).logprobs.square().sum()

    grads = []
    for function in (loss, lambda *leaves: checkpoint(loss, *leaves, use_reentrant=reentrant)):
        leaves = [case[name].clone().requires_grad_() for name in ("hidden", "weight")]
        function(*leaves).backward()
        grads.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("extras", [EXTRAS], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_costs_no_precision(dtype, extras):
    case = make_head(33, 24, 213, extras=extras)
    expected, grads = run_head(linear_logprob, case)
    with torch.autocast(DEVICE.type, dtype=dtype):
        actual, same = run_head(linear_logprob, case)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert all(torch.equal(same[name], grads[name]) for name in grads)


def test_hidden_and_weight_of_different_dtypes():
    case = make_head(33, 24, 213)
    case["weight"] = case["weight"].bfloat16()
    truth, exact = run_head(reference.linear_logprob, double(case))
    ours, grads = run_head(linear_logprob, case)
    torch.testing.assert_close(ours.logprobs.double(), truth.logprobs, rtol=1e-5, atol=1e-5)
    assert grads["hidden"].dtype == torch.float32 and grads["weight"].dtype == torch.bfloat16
    assert error(grads["hidden"], exact["hidden"]) < 1e-5 and error(grads["weight"], exact["weight"]) < 4e-3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.zeros(9, 5)}, r"hidden \(2, 4\) and weight \(9, 5\)"),
        ({"hidden": torch.zeros(2, 4, 1)}, r"hidden \(2, 4, 1\) and weight"),
        ({"hidden": torch.zeros(2, 4, dtype=torch.int64)}, "hidden is torch.int64: it must be fp32, bf16, fp16"),
        (
            {"hidden": torch.zeros(2, 4, dtype=torch.float8_e4m3fn)},
            "hidden is a torch.strided tensor of torch.float8_e4m3fn: pass a dense one",
        ),
        ({"targets": torch.tensor([0, 1], dtype=torch.int32)}, "must be int64"),
        ({"targets": torch.tensor([0])}, "one id for each of the 2 rows"),
        ({"targets": torch.tensor([0, 9])}, r"targets\[1\] = 9 is outside the vocabulary of 9"),
        ({"targets": torch.tensor([-100, 1])}, r"targets\[0\] = -100 .* mask such rows"),
        ({"bias": torch.zeros(8)}, r"bias \(8,\) must have one entry for each of the 9"),
        ({"bias": torch.zeros(9, device="meta")}, "bias is on meta and hidden on cpu"),
        ({"weight": torch.zeros(9, 4, device="meta")}, r"weight is on meta and hidden on cpu: move .* .to\('cpu'\)"),
        ({"targets": torch.zeros(2, dtype=torch.int64, device="meta")}, "targets is on meta"),
        ({"temperature": torch.ones(2, device="meta")}, "temperature is on meta"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"temperature": torch.nan}, "temperature=nan must be positive"),
        ({"temperature": torch.tensor([1.0, -1.0])}, r"temperature\[1\] = -1.0 must be positive"),
        ({"temperature": torch.tensor([torch.inf, 1.0])}, r"temperature\[0\] = inf must be positive and finite"),
        ({"temperature": torch.ones(3)}, r"temperature has shape \(3,\)"),
    ],
)
def test_bad_input_is_named_before_any_sweep(change, message, monkeypatch):
    monkeypatch.setattr(sweep, "backend", None)
    arguments = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(9, 4), "targets": torch.tensor([0, 1])}
    with pytest.raises(InputError, match=message) as caught:
        linear_logprob(**(arguments | change))
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("below", [30.0, 3e4, math.inf])
def test_gradients_of_unlikely_targets_are_as_good_as_torchs(below):
    """A log-prob far below 0 is rounded more coarsely than the log-sum-exp, and -inf cannot be computed with."""
    hidden, weight, targets = (make_head(12, 24, 60)[name] for name in ("hidden", "weight", "targets"))
    bias = torch.zeros(60, device=DEVICE)
    bias[targets[:4]] = -below
    grads = {}
    for name, dtype, compute in (
        ("ours", torch.float32, linear_logprob),
        ("torch's", torch.float32, reference.linear_logprob),
        ("true", torch.float64, reference.linear_logprob),
    ):
        leaves = {"hidden": hidden.to(dtype).requires_grad_(), "weight": weight.to(dtype).requires_grad_()}
        logprobs = compute(**leaves, targets=targets, bias=bias.to(dtype)).logprobs
        grads[name] = dict(zip(leaves, torch.autograd.grad(logprobs.sum(), leaves.values()), strict=True))
    assert_as_good(grads["ours"], grads["torch's"], grads["true"], 1e-6)
