"""The objectives and their coefficients against autograd of their definitions, and the Triton form against torch's."""

import itertools
import math
import subprocess
import sys

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from toolx_kernels import reference
from toolx_kernels.loss_config import CLIPPED_LOSS_TYPES, LOSS_TYPES, GRPOLossConfig
from toolx_kernels.ops.lm_head import objective
from toolx_kernels.ops.lm_head.objective import RowVectors, policy_objective, token_weights

LENGTHS = [3, 0, 2, 1]
N = sum(LENGTHS)
OWNER = torch.repeat_interleave(torch.tensor(LENGTHS))
KL = [{}] + [
    {"beta": 0.1, "kl_estimator": estimator, "kl_gradient": gradient, "use_bias_correction_kl": corrected}
    for estimator in ("k1", "k2", "k3")
    for gradient, corrected in itertools.product(("own", "straight_through", "none"), (False, True))
    if not (gradient == "none" and corrected)
]
MODES = [None, "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]  # None: no sampler log-probs
LEVELS = [(name, "token") for name in LOSS_TYPES] + [(name, "sequence") for name in LOSS_TYPES if name != "vespo"]
PLAIN = torch.tensor([0.3, -1.2, 0.9, 0.05, -0.4, 0.6], dtype=torch.float64)


def config_of(loss_type="grpo", mode=None, **more):
    needed = {"dr_grpo": {"max_completion_length": 6}, "cispo": {"epsilon_high": 1.2}}.get(loss_type, {})
    return GRPOLossConfig(loss_type=loss_type, importance_sampling_mode=mode or "token_truncate", **needed, **more)


OLD, REF, SAMPLER = PLAIN, -PLAIN.flip(0), PLAIN.roll(2)


def make_vectors(old=OLD, ref=REF, sampler=SAMPLER, advantages=(1.1, 0.5, -0.8, -0.4)):
    """Vectors of the objective; ``old``, ``ref`` and ``sampler`` are differences from the policy's own log-probs.

    Advantages are per completion or per token.
    """
    advantages = torch.tensor(advantages, dtype=torch.float64)
    own = -torch.tensor([0.5, 3.0, 1.7, 0.1, 6.0, 2.2], dtype=torch.float64)
    return {
        "logprobs": own,
        "entropy": torch.tensor([0.4, 2.0, 1.0, 0.2, 3.0, 1.5], dtype=torch.float64),
        "advantages": advantages[OWNER] if len(advantages) == len(LENGTHS) else advantages,
        "weights": torch.tensor([0.3, 0.3, 0.3, 0.2, 0.2, 0.7], dtype=torch.float64),
        "old": None if old is None else own - old,
        "ref": None if ref is None else own + ref,
        "sampler": None if sampler is None else own + sampler,
    }


def fast(vectors, config, dtype=torch.float64):
    v = {name: x if x is None else x.to(dtype) for name, x in vectors.items()}
    given = RowVectors(v["advantages"], v["weights"], v["old"], v["ref"], v["sampler"])
    return policy_objective(v["logprobs"], v["entropy"], given, torch.tensor(LENGTHS), config)


def definition(vectors, config):
    """The definition per completion, the weighted per-token losses, and their gradients."""
    leaves = [vectors[name].clone().requires_grad_() for name in ("logprobs", "entropy")]
    kept = torch.ones(N, dtype=torch.bool)
    if config.top_entropy_quantile < 1:
        kept = vectors["entropy"] >= vectors["entropy"].quantile(1 - config.top_entropy_quantile)
    parts = []
    for rows in torch.arange(N).split(LENGTHS):
        others = {name: vectors[name] if vectors[name] is None else vectors[name][rows] for name in ("old", "ref")}
        sampler = vectors["sampler"] if vectors["sampler"] is None else vectors["sampler"][rows]
        parts.append(
            reference.completion_losses(
                *(leaf[rows] for leaf in leaves),
                vectors["advantages"][rows],
                config,
                **others,
                sampler=sampler,
                kept=kept[rows],
                share=vectors["weights"][rows],
            )
        )
    weighted = torch.cat([part.losses for part in parts])
    return parts, weighted.detach(), torch.autograd.grad(weighted.sum(), leaves, allow_unused=True)


def check(vectors, config):
    parts, expected, (by_logprob, by_entropy) = definition(vectors, config)
    actual = fast(vectors, config)
    # the largest terms, up to exp(2 LOG_RATIO_BOUND), cancel and leave their rounding errors
    scale = max(1.0, expected.abs().max().item(), by_logprob.abs().max().item())
    if vectors["ref"] is not None and config.beta:
        gap = (vectors["ref"] - vectors["logprobs"]).nan_to_num(0, 0, 0)
        scale *= min(gap.max().exp().item(), math.exp(reference.LOG_RATIO_BOUND))
    near = {"rtol": 1e-9, "atol": 1e-13 * scale}
    torch.testing.assert_close(actual.losses, expected, **near)
    torch.testing.assert_close(actual.coefficients, by_logprob, **near)
    if config.entropy_coef:
        torch.testing.assert_close(actual.entropy_coefficients, by_entropy)
    else:
        assert actual.entropy_coefficients is None
    for name in ("ratio", "clip_low", "clip_high", "kl", "finite"):
        values = [getattr(part, name) for part in parts]
        torch.testing.assert_close(getattr(actual, name), None if values[0] is None else torch.cat(values), msg=name)
    return actual


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss_type, level", LEVELS)
def test_every_objective_agrees_with_its_definition(loss_type, level, mode):
    if loss_type == "vespo" and mode is not None and mode.startswith("sequence"):
        mode = mode.replace("sequence", "token")
    for kl in KL:
        config = config_of(loss_type, mode, importance_sampling_level=level, importance_sampling_cap=1.3, **kl)
        vectors = make_vectors(ref=REF if kl else None, sampler=None if mode is None else SAMPLER)
        actual = check(vectors, config)
        assert actual.coefficients.abs().sum() > 0


LOG_RATIO = st.floats(-2, 2) | st.sampled_from([-1e30, -200.0, -39.0, 0.0, 39.0, 200.0, 1e30, math.nan, math.inf])
ADVANTAGE = st.floats(-2, 2) | st.just(0.0)
VECTOR = st.none() | st.lists(LOG_RATIO, min_size=N, max_size=N).map(lambda x: torch.tensor(x, dtype=torch.float64))


@settings(max_examples=200)
@given(
    st.sampled_from(LEVELS),
    st.sampled_from(MODES[1:]),
    st.sampled_from(KL),
    VECTOR,
    VECTOR,
    VECTOR,
    st.sampled_from([len(LENGTHS), N]).flatmap(lambda n: st.lists(ADVANTAGE, min_size=n, max_size=n)),
    st.sampled_from([{}, {"delta": 2.5}, {"entropy_coef": 0.2}, {"entropy_coef": 0.2, "top_entropy_quantile": 0.4}]),
)
def test_any_numbers_agree_with_the_definition(level, mode, kl, old, ref, sampler, advantages, more):
    loss_type, level = level
    if loss_type == "vespo":
        mode = mode.replace("sequence", "token")
    if "delta" in more and loss_type not in CLIPPED_LOSS_TYPES:
        more = {}
    if kl and ref is None:
        kl = {}
    config = config_of(loss_type, mode, importance_sampling_level=level, **kl, **more)
    vectors = make_vectors(old, ref, sampler, advantages)
    actual = check(vectors, config)
    for values in actual[:5]:
        assert values is None or values.isfinite().all()


@pytest.mark.parametrize("gap", [-1e30, -100.0, 100.0, 1e30])
@pytest.mark.parametrize("loss_type, level", LEVELS)
def test_huge_log_ratios_stay_finite_in_fp32(loss_type, level, gap):
    vectors = make_vectors()
    changes = [{name: vectors[name] + gap} for name in ("old", "ref", "sampler")]
    changes.append({"old": vectors["old"] - gap, "ref": vectors["ref"] + gap})  # ratio and KL are multiplied
    for kl, change in itertools.product(KL, changes):
        config = config_of(loss_type, "token_truncate", importance_sampling_level=level, **kl)
        actual = fast(vectors | change, config, torch.float32)
        assert actual.finite.all()
        for values in (actual.losses, actual.coefficients, actual.ratio, actual.kl):
            assert values.dtype == torch.float32 and values.isfinite().all()


@pytest.mark.parametrize("loss_type, level", LEVELS)
def test_rows_without_weight_or_advantage_have_no_gradient_whatever_they_hold(loss_type, level):
    config = config_of(loss_type, importance_sampling_level=level)
    vectors = make_vectors(advantages=(0.0, 1.0, 0.7, -0.9), ref=None)
    vectors["old"][:3] = torch.nan
    vectors["sampler"][:3] = torch.tensor([torch.nan, torch.inf, 0])
    actual = check(vectors, config)
    assert actual.finite.all()
    assert (actual.coefficients[:3] == 0).all() and (actual.losses[:3] == 0).all()
    assert (actual.coefficients[3:] != 0).any()

    vectors = make_vectors(ref=None)
    vectors["weights"] = torch.tensor([0, 0, 0, 0.2, 0.2, 0.7], dtype=torch.float64)
    vectors["old"][:3] = torch.nan
    actual = check(vectors, config)
    assert (actual.coefficients[:3] == 0).all() and (actual.losses[:3] == 0).all()
    assert actual.finite.tolist() == [False] * 3 + [True] * 3


@pytest.mark.parametrize("broken", ["logprobs", "old", "ref", "sampler"])
def test_a_row_that_is_not_finite_leaves_the_rest_of_a_token_level_loss_alone(broken):
    config = config_of(beta=0.1, entropy_coef=0.1)
    whole = fast(make_vectors(), config)
    for value in (torch.nan, torch.inf, -torch.inf):
        vectors = make_vectors()
        vectors[broken][1] = value
        if broken == "logprobs":
            vectors["entropy"][1] = torch.nan
        check(vectors, config_of(beta=0.1, entropy_coef=0.1, importance_sampling_level="sequence"))
        actual = check(vectors, config)
        rest = [0, 2, 3, 4, 5]
        assert actual.finite.tolist() == [True, False, True, True, True, True]
        for mine, theirs in zip(actual, whole, strict=True):
            assert mine[1] == 0
            assert torch.equal(mine[rest], theirs[rest])


def test_without_triton_the_torch_form_is_there():
    program = """
import sys, torch
sys.modules["triton"] = None
from toolx_kernels.loss_config import GRPOLossConfig
from toolx_kernels.ops.lm_head import objective
x = torch.tensor([-1.0, -2.0, -3.0])
vectors = objective.RowVectors(torch.ones(3), torch.ones(3), x - 1, None, None)
out = objective.policy_objective(x, None, vectors, torch.tensor([3]), GRPOLossConfig(epsilon=0.5))
print(objective.triton, out.losses.tolist(), out.coefficients.abs().tolist())
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out == "None [-1.5, -1.5, -1.5] [0.0, 0.0, 0.0]\n"


def test_no_rows():
    nothing = torch.zeros(0)
    for loss_type, level in LEVELS:
        for quantile in (1.0, 0.5):
            config = config_of(loss_type, importance_sampling_level=level, top_entropy_quantile=quantile)
            vectors = RowVectors(nothing, nothing, nothing, None, nothing)
            actual = policy_objective(nothing, nothing, vectors, torch.tensor([0, 0]), config)
            assert len(actual.losses) == len(actual.coefficients) == 0


def test_the_entropy_mask_keeps_the_top_share():
    entropy = torch.tensor([0.5, torch.nan, 3.0, 1.0, 2.0, 0.1])
    for quantile, kept in {1.0: {0, 2, 3, 4, 5}, 0.5: {2, 3, 4}, 0.25: {2, 4}, 0.0: {2}}.items():
        assert set(objective.entropy_mask(entropy, quantile).nonzero().flatten().tolist()) == kept
    assert not objective.entropy_mask(torch.full((3,), torch.nan), 0.5).any()


@pytest.mark.parametrize(
    "change, sequences, batch",
    [
        ({}, False, False),
        ({"importance_sampling_level": "sequence"}, True, False),
        ({"loss_type": "luspo"}, False, False),
        ({"loss_type": "vespo"}, True, False),
        ({"mode": "sequence_mask"}, True, False),
        ({"mode": "token_mask", "top_entropy_quantile": 0.3}, False, True),
    ],
)
def test_what_must_be_whole(change, sequences, batch):
    config = config_of(**change)
    assert config.needs_whole_sequences is sequences
    assert objective.needs_whole_batch(config) is batch


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_token_weights(loss_type):
    lengths = torch.tensor([3.0, 0, 2, 1])
    config = config_of(loss_type)
    by_completion = {"grpo": [1 / 3, 1, 1 / 2, 1], "sapo": [1 / 3, 1, 1 / 2, 1]}.get(loss_type, [1, 1, 1, 1])
    normaliser = {"grpo": 4, "sapo": 4, "luspo": 4, "dr_grpo": 4 * 6}.get(loss_type, 6)
    expected = torch.tensor(by_completion)
    torch.testing.assert_close(token_weights(lengths, config, None), expected / normaliser)
    torch.testing.assert_close(token_weights(lengths, config, 10), expected / 10)
    torch.testing.assert_close(token_weights(lengths, config, torch.tensor(10.0)), expected / 10)


# ---- the Triton form

if objective.triton is not None:
    from triton import language as tl

    from toolx_kernels.ops.lm_head.objective import token_objective

    @objective.triton.jit
    def store_objective(
        in_ptr,
        out_ptr,
        n,
        CONFIG: tl.constexpr,
        HAS_OLD: tl.constexpr,
        HAS_REF: tl.constexpr,
        HAS_SAMPLER: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = i < n
        logprobs = tl.load(in_ptr + i, mask=inside, other=0.0)
        entropy = tl.load(in_ptr + n + i, mask=inside, other=0.0)
        advantage = tl.load(in_ptr + 2 * n + i, mask=inside, other=0.0)
        weight = tl.load(in_ptr + 3 * n + i, mask=inside, other=0.0)
        old = tl.load(in_ptr + 4 * n + i, mask=inside, other=0.0)
        ref = tl.load(in_ptr + 5 * n + i, mask=inside, other=0.0)
        sampler = tl.load(in_ptr + 6 * n + i, mask=inside, other=0.0)
        loss, coefficient, entropy_coefficient, ratio, clip_low, clip_high, kl, finite = token_objective(
            logprobs, entropy, advantage, weight, old, ref, sampler, CONFIG, HAS_OLD, HAS_REF, HAS_SAMPLER
        )
        tl.store(out_ptr + i, loss, mask=inside)
        tl.store(out_ptr + n + i, coefficient, mask=inside)
        tl.store(out_ptr + 2 * n + i, entropy_coefficient, mask=inside)
        tl.store(out_ptr + 3 * n + i, ratio, mask=inside)
        tl.store(out_ptr + 4 * n + i, clip_low.to(tl.float32), mask=inside)
        tl.store(out_ptr + 5 * n + i, clip_high.to(tl.float32), mask=inside)
        tl.store(out_ptr + 6 * n + i, kl, mask=inside)
        tl.store(out_ptr + 7 * n + i, finite.to(tl.float32), mask=inside)


@pytest.mark.skipif(objective.triton is None, reason="needs triton")
@pytest.mark.parametrize("loss_type", ["grpo", "cispo", "sapo"])
def test_triton_computes_what_torch_does(loss_type):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n = 40
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(7, n, generator=g)
    rows[2, ::5] = 0
    rows[4, 1], rows[4, 5], rows[5, 2], rows[6, 3] = 200.0, torch.nan, -torch.inf, 1e30
    rows = rows.to(device)
    more = {"delta": 2.5} if loss_type in CLIPPED_LOSS_TYPES else {}
    for i, kl in enumerate(KL):
        config = config_of(loss_type, ("token_truncate", "token_mask")[i % 2], entropy_coef=0.1 * (i % 3), **more, **kl)
        for flags in ((True, bool(kl), True), (i % 2 == 0, True, i % 2 == 1)):
            out = torch.full((8, n), torch.nan, device=device)
            store_objective[(2,)](rows, out, n, config, *flags, 32)
            expected = torch.stack([x.float() for x in objective.in_torch.token_objective(*rows, config, *flags)])
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
