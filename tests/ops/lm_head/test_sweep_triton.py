"""Every Triton kernel of the loss against the torch sweeps, on a GPU if there is one, else in the interpreter."""

import pytest
import torch

from tests.ops.cases import (
    DEVICE,
    EXTRAS,
    TRITON_DTYPES,
    assert_agrees,
    assert_as_good,
    assert_equal_gradients,
    double,
    force,
    make_case,
    make_head,
    needs_triton,
    run_head,
    run_loss,
    sweep_triton,
    use_backend,
    without_logprobs,
)
from toolx_kernels import reference
from toolx_kernels.loss_config import GRPOLossConfig
from toolx_kernels.ops import triton_common
from toolx_kernels.ops.lm_head import objective as losses
from toolx_kernels.ops.lm_head import per_row, sweep_torch, tiles
from toolx_kernels.ops.lm_head.head import HeadInputs
from toolx_kernels.ops.lm_head.linear_grpo import linear_grpo_loss
from toolx_kernels.ops.lm_head.linear_logprob import linear_logprob

pytestmark = needs_triton

PLAN = tiles.SweepSize(1, 10**6, torch.float32, torch.float32)
SHAPES = [(16, 32, 64), (37, 24, 213), (1, 7, 33), (65, 17, 130)]  # N, D, V
NEAR = {"rtol": 2e-5, "atol": 2e-5}
EVERY = pytest.mark.parametrize("extras", [(), EXTRAS, ("bias",)], ids="-".join)
OF_DTYPE = pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
# Rounding in 16 bits does not depend on the shape: two ragged shapes suffice.
OF_CASE = pytest.mark.parametrize(
    "shape, dtype",
    [(shape, dtype) for dtype in TRITON_DTYPES for shape in (SHAPES if dtype == torch.float32 else SHAPES[1::2])],
    ids=str,
)


def make(shape, dtype, extras, start=0):
    """A ``Head`` whose tensors have gaps between their rows, as slices do."""
    case = make_head(*shape, dtype, extras)

    def apart(tensor):
        return torch.stack([tensor, tensor * torch.nan], 1)[:, 0]

    temperature = case.get("temperature", torch.full((shape[0],), 0.7, device=DEVICE))
    inputs = HeadInputs(
        apart(case["hidden"]), apart(case["weight"]), case["targets"], temperature, case.get("bias"),
        case.get("softcap", 0.0), -1,
    )  # fmt: skip
    return inputs.head()._replace(start=start)


def nans(*shape, dtype=torch.float32):
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def guarded(n, vocab, dtype, tight=False):
    """An (n, vocab) output for a sweep, between a guard row before and one after; all NaN. Kernels may write the
    padding of a row, up to the start of the next."""
    memory = nans(n + 2, vocab if tight else -(-vocab // 64) * 64, dtype=dtype)
    return memory, memory[1:-1, :vocab]


def assert_untouched(memory):
    assert memory[[0, -1]].isnan().all()


def stored(dtype):
    return dtype if dtype != torch.float16 else torch.float32


def widened(head):
    """The same numbers in fp32, so that torch's sweeps round nothing to 16 bits."""
    return head._replace(
        **{
            name: getattr(head, name).float()
            for name in ("hidden", "weight", "bias")
            if getattr(head, name) is not None
        }
    )


@OF_CASE
@EVERY
def test_target_logits(shape, dtype, extras):
    head = make(shape, dtype, extras, start=2)  # some targets lie before the first row of this weight
    actual, expected = sweep_triton.target_logits(head), sweep_torch.target_logits(widened(head))
    torch.testing.assert_close(actual, expected, **NEAR)
    assert (actual[head.targets < 2] == 0).all()


def other_target_logits(head):
    """Target logits that differ from the GEMM's, which reveals whether a sweep uses them."""
    return sweep_torch.target_logits(widened(head)) + 0.5


@OF_CASE
@pytest.mark.parametrize("extras, entropy", [((), True), (EXTRAS, True), (EXTRAS, False), (("bias",), True)], ids=str)
def test_online_sums(shape, dtype, extras, entropy, poisoned):
    head = make(shape, dtype, extras)
    exact = other_target_logits(head)
    actual = sweep_triton.online_sums(head, exact, PLAN, entropy=entropy)
    expected = sweep_torch.online_sums(widened(head), exact, PLAN, entropy=entropy)
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **NEAR)


@OF_CASE
@EVERY
def test_exponentials(shape, dtype, extras, poisoned):
    head = make(shape, dtype, extras, start=1)
    anchor = torch.linspace(-2, 4, shape[0], device=DEVICE)
    memory, actual = guarded(shape[0], shape[2], stored(dtype))
    exact = other_target_logits(head)
    sums = [part.sum(0) for part in sweep_triton.exponentials(head, exact, anchor, actual, PLAN)]
    expected = nans(shape[2], shape[0]).T  # the layout of the torch sweeps
    theirs = [part.sum(0) for part in sweep_torch.exponentials(widened(head), exact, anchor, expected, PLAN)]
    rounding = {"rtol": 4e-3, "atol": 1e-5} if dtype == torch.bfloat16 else NEAR
    torch.testing.assert_close(actual.float(), expected, **rounding)
    torch.testing.assert_close(sums, theirs, rtol=2e-5, atol=2e-3)
    inside = (head.targets >= 1) & (head.targets < shape[2] + 1)
    assert (actual[inside, head.targets[inside] - 1] == 0).all()
    assert_untouched(memory)


@OF_CASE
@EVERY
def test_logit_gradients(shape, dtype, extras):
    head = make(shape, dtype, extras, start=1)
    n, _, vocab = shape
    lse = sweep_torch.online_sums(widened(head), other_target_logits(head), PLAN, entropy=False)[0] + 1
    alpha, beta, at_target = (torch.linspace(low, 1, n, device=DEVICE) for low in (-2, 0.5, -7))
    memory, actual = guarded(n, vocab, stored(dtype), tight=True)
    sweep_triton.logit_gradients(head, lse, alpha, beta, at_target, actual, PLAN)
    expected = nans(n, vocab)
    sweep_torch.logit_gradients(widened(head), lse, alpha, beta, at_target, expected, PLAN)
    rounding = {"rtol": 4e-3, "atol": 1e-5} if dtype == torch.bfloat16 else NEAR
    torch.testing.assert_close(actual.float(), expected, **rounding)
    assert_untouched(memory)


@pytest.mark.parametrize("vocab", [31, 4096, 9001])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@OF_DTYPE
def test_reweigh(dtype, softcap, vocab):
    head = make((9, 8, 5), dtype, ())._replace(softcap=softcap)
    g = torch.Generator().manual_seed(0)
    anchor, alpha, beta = (torch.randn(9, generator=g).to(DEVICE) for _ in range(3))
    memory, actual = guarded(9, vocab, stored(dtype))
    actual.copy_(torch.randn(9, vocab, generator=g).exp())
    actual[:, ::7] = 0  # targets and underflowed entries
    expected = actual.float().clone()
    sweep_triton.reweigh(head, actual, anchor, alpha, beta, PLAN)
    sweep_torch.reweigh(head, expected, anchor, alpha, beta, PLAN)
    rounding = {"rtol": 4e-3, "atol": 1e-5} if dtype == torch.bfloat16 else NEAR
    torch.testing.assert_close(actual.float(), expected, **rounding)
    assert (actual[:, ::7] == 0).all()
    assert_untouched(memory)


@pytest.mark.parametrize("vocab", [31, 4096, 9001])
@OF_DTYPE
def test_move_rows(dtype, vocab):
    source, target = torch.tensor([8, 5, 7], device=DEVICE), torch.tensor([0, 3, 1], device=DEVICE)
    memory, actual = guarded(9, vocab, dtype)
    actual.copy_(torch.randn(9, vocab))
    expected = actual.clone()
    sweep_triton.move_rows(actual, source, target)
    expected[target] = expected[source]
    assert torch.equal(actual, expected)
    assert_untouched(memory)
    sweep_triton.move_rows(actual, source[:0], target[:0])
    assert torch.equal(actual, expected)


@OF_DTYPE
@pytest.mark.parametrize("n", [1, 128, 200])
def test_place_targets(n, dtype):
    head = make((n, 8, 50), dtype, (), start=20)._replace(targets=torch.arange(n, device=DEVICE) % 90)
    memory, actual = guarded(n, 50, dtype)
    actual.fill_(3.0)
    values = torch.arange(n, device=DEVICE).to(torch.float32)
    sweep_triton.place_targets(head, actual, values)
    expected = torch.full((n, 50), 3.0, device=DEVICE)
    for row, target in enumerate(head.targets.tolist()):
        if 20 <= target < 70:
            expected[row, target - 20] = row
    torch.testing.assert_close(actual.float(), expected, rtol=4e-3, atol=0)
    assert_untouched(memory)


@OF_DTYPE
@pytest.mark.parametrize("dim", [16, 1500])
def test_finish_rows(dim, dtype):
    head = make((9, dim, 50), dtype, (), start=20)._replace(targets=10 * torch.arange(9, device=DEVICE))
    g = torch.Generator().manual_seed(0)
    part, factor, at_target = (torch.randn(*shape, generator=g).to(DEVICE) for shape in ((9, dim), (9,), (9,)))
    index = torch.tensor([11, 3, 4, 0, 7, 8, 9, 1, 6], device=DEVICE)
    actual, expected = nans(12, dim), nans(12, dim)
    sweep_triton.finish_rows(head, part.clone(), factor, at_target, actual, index)
    sweep_torch.finish_rows(head, part.clone(), factor, at_target, expected, index)
    torch.testing.assert_close(actual, expected, **NEAR, equal_nan=True)
    assert actual[[2, 5, 10]].isnan().all()
    inside = (head.targets >= 20) & (head.targets < 70)
    torch.testing.assert_close(actual[index[~inside]], (factor[:, None] * part)[~inside], **NEAR)


CONFIGS = [
    {},
    {"beta": 0.1, "kl_estimator": "k1", "use_bias_correction_kl": True},
    {"delta": 1.4, "entropy_coef": 0.1, "importance_sampling_mode": "token_mask"},
    {"loss_type": "cispo", "epsilon_high": 1.2},
    {"loss_type": "sapo", "beta": 0.1, "kl_gradient": "none"},
]


@pytest.mark.parametrize("n, n_tiles", [(1, 1), (16, 64), (37, 65), (50, 3)])
@pytest.mark.parametrize("settings", CONFIGS, ids=str)
def test_statistics_with_the_objective(settings, n, n_tiles, poisoned):
    config = GRPOLossConfig(**settings)
    g = torch.Generator().manual_seed(0)
    partials = torch.rand(n_tiles, n, generator=g).to(DEVICE), -torch.rand(n_tiles, n, generator=g).to(DEVICE)
    anchor, target, advantages, own = (torch.randn(n, generator=g).to(DEVICE) for _ in range(4))
    target = target + anchor
    logprobs = target - anchor - partials[0].sum(0).log()
    given = (logprobs + 0.3 * own, logprobs - 0.2 * own, logprobs + 0.4 * own.flip(0))
    for softcap, kept in ((0.0, given), (9.0, (None, given[1], None)), (0.0, (given[0], given[1], None))):
        vectors = losses.RowVectors(advantages, torch.rand(n, generator=g).to(DEVICE), *kept)
        head = make((n, 8, 5), torch.float32, ("temperature",))._replace(softcap=softcap)
        arguments = (partials, anchor, target, head, vectors, config, torch.tensor([n], device=DEVICE))
        found, objective, factors = per_row.statistics_and_objective(*arguments, fused=True)
        expected, wanted, others = per_row.statistics_and_objective(*arguments, fused=False)
        torch.testing.assert_close(tuple(found), tuple(expected), **NEAR)
        torch.testing.assert_close(tuple(factors), tuple(others), **NEAR)
        for name, theirs in wanted._asdict().items():
            mine = getattr(objective, name)
            assert (mine is None) == (theirs is None), name
            if theirs is not None:
                torch.testing.assert_close(mine, theirs.to(mine.dtype), **NEAR, msg=name)


# ---- the whole loss


@pytest.mark.parametrize("dtype, extras", [(torch.float32, ()), *((dtype, EXTRAS) for dtype in TRITON_DTYPES)], ids=str)
def test_linear_logprob(dtype, extras, monkeypatch, poisoned):
    case = make_head(33, 24, 213, dtype, extras)
    _, exact = run_head(reference.linear_logprob, double(case))
    force(monkeypatch, "recompute", rows=20, columns=70)
    theirs, theirs_grads = run_head(linear_logprob, case)
    use_backend(monkeypatch, "triton")
    ours, grads = run_head(linear_logprob, case)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-5)
    assert_as_good(grads, theirs_grads, exact, {torch.float32: 2e-6}.get(dtype, 4e-4))


GRPO = [
    ({}, (), ("single",)),
    ({}, ("old_logprobs",), ("single",)),
    ({"entropy_coef": 0.1, "beta": 0.1}, ("old_logprobs", "ref_logprobs", "sampler_logprobs"), ("single",)),
    ({"importance_sampling_level": "sequence"}, ("old_logprobs",), ("single",)),
    ({"loss_type": "vespo"}, ("old_logprobs", "sampler_logprobs"), ("single",)),
    ({"top_entropy_quantile": 0.4}, ("old_logprobs",), ("recompute",)),
    ({"recompute": True, "entropy_coef": 0.1}, ("old_logprobs",), ("forward", "deferred")),
]


# The objective depends on log-probs only, so the extras are tested once with each kind of sweep.
@pytest.mark.parametrize(
    "settings, kept, way, extras",
    [(*case, ()) for case in GRPO] + [(*GRPO[at], EXTRAS) for at in (2, 5, 6)],
    ids=str,
)
def test_linear_grpo_loss(settings, kept, way, extras, monkeypatch, taken, poisoned):
    case = without_logprobs(make_case(masked=(3, 22), extras=extras), *kept)
    config = GRPOLossConfig(**settings)
    truth, exact = run_loss(reference.linear_grpo_loss, double(case), config)
    force(monkeypatch, "chunks", rows=16, columns=70)
    use_backend(monkeypatch, "triton")
    ours, grads = run_loss(linear_grpo_loss, case, config)
    assert set(taken) == set(way)
    assert_agrees(ours, truth, 1e-4)
    assert_equal_gradients(grads, exact, 2e-5)


def test_linear_grpo_loss_in_bf16(monkeypatch, poisoned):
    """Exponentials stored in 16 bits, reweighed and rounded again in the gradients are no worse than torch's sweeps."""
    case = make_case(masked=(3, 22), dtype=torch.bfloat16, extras=EXTRAS, noise=0.05)
    config = GRPOLossConfig(entropy_coef=0.1, beta=0.1)
    _, exact = run_loss(reference.linear_grpo_loss, double(case), config)
    force(monkeypatch, "chunks", rows=16, columns=70)
    theirs, theirs_grads = run_loss(linear_grpo_loss, case, config)
    use_backend(monkeypatch, "triton")
    ours, grads = run_loss(linear_grpo_loss, case, config)
    assert_agrees(ours, theirs, 1e-4)
    assert_as_good(grads, theirs_grads, exact, 4e-4)


def test_the_objective_is_fused_where_it_can_be(monkeypatch):
    calls = []
    original = per_row.fused_statistics
    monkeypatch.setattr(per_row, "fused_statistics", lambda *a: calls.append(1) or original(*a))
    force(monkeypatch, "one chunk")
    use_backend(monkeypatch, "triton")
    case = without_logprobs(make_case(), "old_logprobs")
    run_loss(linear_grpo_loss, case, GRPOLossConfig())
    assert len(calls) == 1
    config = GRPOLossConfig(importance_sampling_level="sequence")
    assert config.needs_whole_sequences
    run_loss(linear_grpo_loss, case, config)
    assert len(calls) == 1


@pytest.mark.parametrize("path", ["chunks", "recompute", "deferred"])
def test_rows_that_are_not_finite_touch_no_gradient(path, monkeypatch):
    case = without_logprobs(make_case(), "old_logprobs")
    case["hidden"][7] = torch.nan
    case["old_logprobs"][20] = -torch.inf
    config = GRPOLossConfig(recompute=path == "deferred")
    truth, exact = run_loss(reference.linear_grpo_loss, double(case), config)
    force(monkeypatch, path)
    use_backend(monkeypatch, "triton")
    ours, grads = run_loss(linear_grpo_loss, case, config)
    assert ours.stats["nonfinite"] == 2
    torch.testing.assert_close(ours.loss.double(), truth.loss, rtol=1e-4, atol=1e-5)
    assert_equal_gradients(grads, exact, 2e-5)
    assert (grads["hidden"][[7, 20]] == 0).all()


def test_interpreted_kernels_are_what_runs_here():
    """Kernels are interpreted exactly if there is no GPU; otherwise this file would not test them."""
    assert triton_common.INTERPRETED is not torch.cuda.is_available()
