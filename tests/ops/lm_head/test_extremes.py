"""Extreme log-ratios and tiny ones: every path and objective gives float64's results, or drops and counts the row."""

import functools
import itertools
import math
from decimal import Decimal, localcontext

import pytest
import torch

from tests.ops.cases import (
    BACKENDS,
    DEVICE,
    EXTRAS,
    PATHS,
    double,
    force,
    make_case,
    make_head,
    needs_triton,
    run_loss,
    use_backend,
    without_logprobs,
)
from tests.ops.lm_head.test_vocab_shard import on_every_rank
from toolx_kernels import reference
from toolx_kernels.loss_config import GRPOLossConfig
from toolx_kernels.ops import dual
from toolx_kernels.ops.dual import in_torch
from toolx_kernels.ops.lm_head.linear_grpo import linear_grpo_loss

OLD = (-100.0, -60.0, -39.0, 0.5, 20.0, 39.0, 100.0)  # log-ratios
REF = (-30.0, 0.1, 15.0, 100.0)
SAMPLER = (-39.0, 0.1, 39.0)
CORRECTED = {"beta": 1.0, "use_bias_correction_kl": True}
SEQUENCE = {"importance_sampling_level": "sequence", "kl_estimator": "k2"}
CONFIGS = {
    "grpo": {"importance_sampling_cap": 1e6, "beta": 1.0},
    "corrected": CORRECTED,
    "straight-through": CORRECTED | {"kl_gradient": "straight_through", "beta": 1e9},
    "in the advantage": {"beta": 1.0, "kl_gradient": "none", "importance_sampling_cap": 1e30},
    "cispo": {"loss_type": "cispo", "epsilon_high": math.inf, "importance_sampling_cap": 1e30},
    "sapo": {"loss_type": "sapo", "importance_sampling_cap": 1e6},
    "vespo": {"loss_type": "vespo", "importance_sampling_cap": 1e6, "beta": 1.0},
    "entropy": {"entropy_coef": 0.1, "importance_sampling_cap": 1e6, **CORRECTED},
    "gspo": CORRECTED | SEQUENCE | {"beta": 1e15, "importance_sampling_cap": 1e30},
    "luspo": CORRECTED | SEQUENCE | {"loss_type": "luspo", "delta": 1e16},
    "sequence weight": {"importance_sampling_mode": "sequence_truncate", "importance_sampling_cap": 1e18},
    "dapo": {"loss_type": "dapo", "importance_sampling_mode": "token_mask", "importance_sampling_cap": 1e17},
}
APPLIES_ALL = {"grpo", "sapo", "vespo", "luspo", "sequence weight"}


def config_of(name, path):
    return GRPOLossConfig(recompute=path == "deferred", **CONFIGS[name])


@functools.cache
def grid(name: str, step: int = 1) -> dict:
    """One row per combination of log-ratios, or every ``step``-th; three are a completion."""
    drifts = torch.tensor(list(itertools.product(OLD, REF, SAMPLER)), device=DEVICE)[::step]
    case = make_head(len(drifts), dim=8, vocab=40, extras=EXTRAS if name == "entropy" else ())
    own = reference.linear_logprob(**double(case)).logprobs.float()
    old = own - drifts[:, 0]
    case |= {"old_logprobs": old, "ref_logprobs": own + drifts[:, 1], "sampler_logprobs": old - drifts[:, 2]}
    bounds = [*range(0, len(drifts), len(SAMPLER)), len(drifts)]
    signs = torch.tensor([1.0, -1.5, 0.7], device=DEVICE)
    case["advantages"] = signs[torch.arange(len(bounds) - 1, device=DEVICE) % 3]
    return case | {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32, device=DEVICE)}


@functools.cache
def truth(name: str, step: int = 1):
    return run_loss(reference.linear_grpo_loss, double(grid(name, step)), config_of(name, None))


def assert_exact(name, output, grads, step=1, tolerance=3e-4):
    """Asserts that stats and each row's gradient are those of float64, and that a dropped row's are zeros."""
    exact, expected = truth(name, step)
    for stat, value in exact.stats.items():
        assert math.isclose(output.stats[stat], value, rel_tol=tolerance), stat
    assert math.isclose(output.loss.item(), exact.loss.item(), rel_tol=tolerance)
    size = expected["hidden"].norm(dim=1)
    error = (grads["hidden"].double() - expected["hidden"]).norm(dim=1)
    assert (error <= tolerance * size + 1e-9 * (size > 0)).all()
    for of in grads.keys() - {"hidden"}:
        assert (grads[of].double() - expected[of]).norm() <= tolerance * expected[of].norm(), of


@pytest.mark.parametrize("name", CONFIGS)
def test_a_grid_of_log_ratios(name, monkeypatch):
    for path in PATHS if name == "entropy" else ("one chunk", "recompute"):
        with monkeypatch.context() as patch:
            force(patch, path)
            assert_exact(name, *run_loss(linear_grpo_loss, grid(name), config_of(name, path)))
    assert (truth(name)[0].stats["nonfinite"] == 0) == (name in APPLIES_ALL)


@needs_triton
@pytest.mark.parametrize("name", ["entropy", "gspo"])
def test_a_grid_of_log_ratios_in_triton(name, monkeypatch):
    use_backend(monkeypatch, "triton")
    for path in ("one chunk", "recompute"):
        with monkeypatch.context() as patch:
            force(patch, path)
            assert_exact(name, *run_loss(linear_grpo_loss, grid(name, 9), config_of(name, path)), step=9)


def test_a_grid_of_log_ratios_on_vocabulary_shards(monkeypatch):
    force(monkeypatch, "one chunk")
    case = grid("cispo")
    results = on_every_rank((17, 23), case, lambda own: run_loss(linear_grpo_loss, own, config_of("cispo", None)))
    weight = torch.cat([grads["weight"] for _, grads in results])
    for output, grads in results:
        assert_exact("cispo", output, grads | {"weight": weight})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "config, others",
    [
        (CORRECTED, {"ref_logprobs": -30.0}),
        ({"importance_sampling_cap": 1e6}, {"old_logprobs": -39.0, "sampler_logprobs": -78.0}),
        ({"loss_type": "cispo", "epsilon_high": math.inf}, {}),
    ],
    ids=["corrected KL", "importance weight", "cispo without a cap"],
)
def test_a_coefficient_that_fits_where_its_product_with_the_anchor_does_not(config, others, backend, monkeypatch):
    use_backend(monkeypatch, backend)
    case = {
        "hidden": torch.tensor([[6.0, 0.0], [1.0, 1.0]], device=DEVICE),
        "weight": torch.eye(2, device=DEVICE),
        "targets": torch.tensor([0, 0], device=DEVICE),
        "cu_seqlens": torch.tensor([0, 1, 2], dtype=torch.int32, device=DEVICE),
        "advantages": torch.tensor([-1.0, 1.0], device=DEVICE),
    }
    for name, value in {"old_logprobs": -50.0, **others}.items():
        case[name] = torch.tensor([value, -0.7], device=DEVICE)
    config = GRPOLossConfig(**config)
    output, grads = run_loss(linear_grpo_loss, case, config)
    exact, expected = run_loss(reference.linear_grpo_loss, double(case), config)
    assert output.stats["nonfinite"] == exact.stats["nonfinite"] == 0
    for name, value in expected.items():
        torch.testing.assert_close(grads[name].double(), value, rtol=1e-4, atol=1e-6)


def test_a_dropped_token_takes_with_it_those_that_share_its_ratio():
    case = without_logprobs(grid("cispo"))
    case["ref_logprobs"] = grid("cispo")["ref_logprobs"] * 0 - 3.0
    case["ref_logprobs"][4] = 35.0
    for level, dropped in {"token": [4], "sequence": [3, 4, 5]}.items():
        config = GRPOLossConfig(beta=1e18, importance_sampling_level=level)
        for run, given in ((linear_grpo_loss, case), (reference.linear_grpo_loss, double(case))):
            output, grads = run_loss(run, given, config)
            assert output.stats["nonfinite"] == len(dropped)
            assert (grads["hidden"].norm(dim=1) == 0).nonzero().flatten().tolist() == dropped


# ---- digits near zero

GAPS = [sign * 10.0**e for e in range(-12, 1) for sign in (-1, 1)] + [-40.0, -7.0, -0.9, 0.9, 1.1, 3.0, 40.0]


def k3_exactly(gap: float) -> tuple[float, float]:
    with localcontext() as context:
        context.prec = 60
        exact = Decimal(gap)
        return float(exact.exp() - exact - 1), float(1 - exact.exp())


if dual.triton is not None:
    from triton import language as tl

    from toolx_kernels.ops.dual import k3_estimate

    @dual.triton.jit
    def store_k3(gap_ptr, out_ptr, n, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        value, slope = k3_estimate(tl.load(gap_ptr + i, mask=i < n, other=0.0))
        tl.store(out_ptr + i, value, mask=i < n)
        tl.store(out_ptr + n + i, slope, mask=i < n)


def k3_of_reference(gap):
    gap = gap.clone().requires_grad_()
    value = reference.k3_estimate(gap)
    (slope,) = torch.autograd.grad(value.sum(), gap)
    return value.detach(), -slope


def k3_in_triton(gap):
    out = gap.new_empty(2, len(gap))
    store_k3[(1,)](gap, out, len(gap), BLOCK=64)
    return out


@pytest.mark.parametrize(
    "of, dtype, tolerance",
    [
        (in_torch.k3_estimate, torch.float32, 5e-7),
        (in_torch.k3_estimate, torch.float64, 1e-15),
        (k3_of_reference, torch.float32, 5e-7),
        (k3_of_reference, torch.float64, 1e-15),
        pytest.param(k3_in_triton, torch.float32, 1e-6, marks=needs_triton),
    ],
)
def test_the_kl_estimate_keeps_its_digits(of, dtype, tolerance):
    gap = torch.tensor(GAPS, dtype=dtype, device=DEVICE)
    expected = torch.tensor([k3_exactly(x) for x in gap.tolist()], dtype=torch.float64, device=DEVICE).T
    actual = torch.stack(list(of(gap))).double()
    assert (actual[0] > 0).all()
    assert ((actual - expected).abs() / expected.abs()).max() < tolerance


@pytest.mark.parametrize("gap", [2.0, 10.0, 39.0])
def test_the_slope_of_a_corrected_kl_keeps_its_digits(gap):
    logprob = torch.tensor([-45.0])
    config = GRPOLossConfig(**CORRECTED)
    nothing, one = torch.zeros(1), torch.ones(1)
    flags = True, True, False
    out = in_torch.token_objective(logprob, nothing, nothing, one, logprob, logprob + gap, nothing, config, *flags)
    assert math.isclose(out[1], -gap, rel_tol=1e-6)  # the ratio is 1, so the slope is that of the reverse KL


@pytest.mark.parametrize("log_ratio", [2.0, 2.8, 3.2])
def test_the_slope_of_a_gate_near_1_keeps_its_digits(log_ratio):
    logprob, nothing, one = torch.tensor([-1.0]), torch.zeros(1), torch.ones(1)
    config = GRPOLossConfig(loss_type="sapo")
    flags = True, False, False
    old = logprob - log_ratio
    out = in_torch.token_objective(logprob, nothing, one, one, old, nothing, nothing, config, *flags)
    ratio = math.exp(float(logprob - old))
    gate = 1 / (1 + math.exp(ratio - 1))
    assert math.isclose(out[1], -4 * gate * (1 - gate) * ratio, rel_tol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)], ids=str)
@pytest.mark.parametrize("softcap", [1e-3, 1e-2, 0.1, 1.0])
def test_gradients_of_small_softcaps_are_those_of_float64(softcap, dtype, tolerance):
    case = without_logprobs(make_case(dtype=dtype, extras=("bias",))) | {"softcap": softcap}
    _, expected = run_loss(linear_grpo_loss, double(case), GRPOLossConfig(recompute=True))
    _, actual = run_loss(linear_grpo_loss, case, GRPOLossConfig())
    tolerance = max(tolerance, 1.5e-7 / softcap)  # the rounding of the logits
    for name, gradient in actual.items():
        assert (gradient.double() - expected[name]).norm() <= tolerance * expected[name].norm(), name
