"""Token advantages: the loss by hand, against the definition, and against one advantage per completion."""

import itertools

import pytest
import torch

from tests.ops.cases import (
    BACKENDS,
    DEVICE,
    assert_agrees,
    assert_equal_gradients,
    double,
    force,
    make_case,
    run_loss,
    use_backend,
    with_leaves,
    without_logprobs,
)
from toolx_kernels import reference
from toolx_kernels.errors import InputError
from toolx_kernels.loss_config import LOSS_TYPES, GRPOLossConfig
from toolx_kernels.ops.lm_head import sweep
from toolx_kernels.ops.lm_head.linear_grpo import linear_grpo_loss

LENGTHS = (4, 1, 6, 0, 3, 5)
N, B = sum(LENGTHS), len(LENGTHS)
BOUNDS = list(itertools.accumulate(LENGTHS, initial=0))
MASKED = (2, 7, 12)
# Nonzero advantages: in the first completion only a masked token's, in the third some, in the fifth none.
ADVANTAGES = torch.tensor([0, 0, 1.5, 0] + [0.8] + [-1.1, 0, 0.4, 0, 2.0, 0] + [0, 0, 0] + [0.3, -0.7, 0.9, 0, -2.0])
OLD, REF, SAMPLER = "old_logprobs", "ref_logprobs", "sampler_logprobs"
LEVELS = [(name, "token") for name in LOSS_TYPES] + [(name, "sequence") for name in LOSS_TYPES if name != "vespo"]
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
FUNCTIONS = [reference.linear_grpo_loss, linear_grpo_loss]
ON_BOTH = pytest.mark.parametrize("function", FUNCTIONS, ids=["reference", "op"])


def token_case(*kept, masked=MASKED, advantages=ADVANTAGES, dtype=torch.float64, **others):
    case = make_case(LENGTHS, range(B), noise=0.3, masked=masked, dim=6, vocab=31, dtype=dtype, **others)
    del case["rewards"], case["group_size"]
    return without_logprobs(case, *kept) | {"advantages": advantages.to(DEVICE, dtype)}


def config_of(loss_type="grpo", level="token", **more):
    needed = {"dr_grpo": {"max_completion_length": 6}, "cispo": {"epsilon_high": 1.1}}.get(loss_type, {})
    return GRPOLossConfig(loss_type=loss_type, importance_sampling_level=level, **needed, **more)


# ---- by hand


def by_hand(hidden, weight, targets, mask, cu_seqlens, advantages, old_logprobs, *, sequence, **_):
    """-min(r A, clip(r) A) of each unmasked token; mean over the tokens of a completion, then over completions."""
    logprobs = torch.log_softmax(hidden @ weight.T, -1)[torch.arange(N), targets]
    means = []
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        rows = [row for row in range(start, end) if mask[row]]
        log_ratio = logprobs[rows] - old_logprobs[rows]
        ratio = log_ratio.mean().exp() if sequence else log_ratio.exp()
        by_token = -torch.minimum(ratio * advantages[rows], ratio.clamp(0.8, 1.2) * advantages[rows])
        means.append(by_token.sum() / max(1, len(rows)))
    return sum(means) / len(means)


@pytest.mark.parametrize("level", ["token", "sequence"])
@ON_BOTH
def test_the_clipped_loss_by_hand(function, level):
    """A token without an advantage has a gradient only at sequence level, through its share in the ratio."""
    case = token_case(OLD)
    case[OLD][[5, 14]] += torch.tensor([2.0, -2.0], dtype=torch.float64, device=DEVICE)  # beyond both clip bounds
    ours, grads = run_loss(function, case, config_of(level=level))
    arguments, leaves = with_leaves(case)
    loss = by_hand(**arguments, sequence=level == "sequence")
    expected = dict(zip(leaves, torch.autograd.grad(loss, leaves.values()), strict=True))
    torch.testing.assert_close(ours.loss, loss.detach())
    assert_equal_gradients(grads, expected)
    assert level == "sequence" or (ours.stats["clip_low"] > 0 and ours.stats["clip_high"] > 0)


# ---- against the definition

KL, EVERYTHING = {"beta": 0.1, "kl_estimator": "k1"}, (OLD, REF, SAMPLER)
FORMS = [
    ({}, (OLD, SAMPLER)),
    ({}, (SAMPLER,)),
    (KL | {"entropy_coef": 0.1, "use_bias_correction_kl": True}, EVERYTHING),
    (KL | {"kl_gradient": "none"}, EVERYTHING),
]


@pytest.mark.parametrize("loss_type, level", LEVELS)
def test_every_objective_agrees_with_its_definition(loss_type, level, monkeypatch, taken):
    """On-policy, off-policy and one of ``FORMS`` for each mode of the importance weights."""
    modes = [mode for mode in MODES if loss_type != "vespo" or mode.startswith("token")]
    forms = [({}, ()), ({}, (OLD,)), (KL | {"entropy_coef": 0.1, "top_entropy_quantile": 0.5}, EVERYTHING)]
    for place, mode in enumerate(modes, LEVELS.index((loss_type, level))):
        settings, kept = FORMS[place % len(FORMS)]
        forms.append((settings | {"importance_sampling_mode": mode, "importance_sampling_cap": 1.1}, kept))
    for place, (settings, kept) in enumerate(forms):
        config, case = config_of(loss_type, level, **settings), token_case(*kept, extras=("bias",))
        truth, exact = run_loss(reference.linear_grpo_loss, case, config)
        with monkeypatch.context() as patch:
            force(patch, ("chunks", "recompute")[place % 2])
            ours, grads = run_loss(linear_grpo_loss, case, config)
        assert_agrees(ours, truth)
        assert_equal_gradients(grads, exact)
        assert exact["hidden"].abs().sum() > 0 and exact.keys() == {"hidden", "weight", "bias"}
    assert set(taken) == {"single", "recompute"}


@pytest.mark.parametrize("settings", [{}, {"loss_type": "vespo"}], ids=["rows", "sequences"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_on_either_backend(backend, settings, monkeypatch):
    case = token_case(OLD, SAMPLER, dtype=torch.float32)
    truth, exact = run_loss(reference.linear_grpo_loss, double(case), config_of(**settings))
    force(monkeypatch, "chunks", rows=16)
    use_backend(monkeypatch, backend)
    ours, grads = run_loss(linear_grpo_loss, case, config_of(**settings))
    assert_agrees(ours, truth, 1e-5)
    assert_equal_gradients(grads, exact, 1e-5)


@pytest.mark.parametrize("loss_type, level", LEVELS)
@ON_BOTH
def test_equal_ones_within_each_completion_are_one_to_the_bit(function, loss_type, level):
    of_completion = torch.tensor([0.7, 0.0, -1.3, 1.0, 0.0, 0.4])
    of_token = of_completion.repeat_interleave(torch.tensor(LENGTHS))
    config = config_of(loss_type, level, entropy_coef=0.1 * (loss_type == "cispo"))
    results = [run_loss(function, token_case(OLD, SAMPLER, advantages=a), config) for a in (of_completion, of_token)]
    (one, gradients), (other, same) = results
    for name in ("loss", "logprobs", "entropy"):
        torch.testing.assert_close(getattr(other, name), getattr(one, name), rtol=0, atol=0, equal_nan=True)
    assert all(other.stats[name].equal(one.stats[name]) for name in one.stats)
    assert gradients.keys() == same.keys() and all(same[name].equal(gradients[name]) for name in same)


# ---- computed rows


@pytest.mark.parametrize(
    "settings, live",
    [
        ({}, {4, 5, 9, 14, 15, 16, 18}),
        ({"level": "sequence"}, {4, 5, 6, 8, 9, 10, *range(14, 19)}),
        ({"importance_sampling_mode": "sequence_mask"}, {4, 5, 6, 8, 9, 10, *range(14, 19)}),
        ({"loss_type": "vespo"}, {4, 5, 6, 8, 9, 10, *range(14, 19)}),
        ({"compute_all_logprobs": True}, set(range(N)) - set(MASKED)),
    ],
    ids=str,
)
@ON_BOTH
def test_rows_without_an_advantage_are_computed_only_where_others_need_them(function, settings, live):
    output, grads = run_loss(function, token_case(OLD, SAMPLER), config_of(**settings))
    assert set(output.logprobs.isfinite().nonzero().flatten().tolist()) == live
    assert output.stats["live_tokens"] == len(live)
    every, same = run_loss(function, token_case(OLD, SAMPLER), config_of(**settings | {"compute_all_logprobs": True}))
    torch.testing.assert_close(every.loss, output.loss)
    assert_equal_gradients(same, grads)


@pytest.mark.parametrize("level, dropped", [("token", 0), ("sequence", 2)])
@ON_BOTH
def test_log_probs_that_nobody_needs_may_be_nan(function, level, dropped):
    """A row without an advantage needs no log-probs, unless its completion shares one ratio."""
    case = token_case(OLD, SAMPLER)
    case[OLD][[0, 6, 11]] = case[SAMPLER][[1, 17, 13]] = torch.nan
    output, grads = run_loss(function, case, config_of(level=level))
    assert output.stats["nonfinite"] == dropped
    whole, gradients = run_loss(function, token_case(OLD, SAMPLER), config_of(level=level))
    if dropped:
        assert output.loss != whole.loss and output.loss.isfinite()
    else:
        assert output.loss.equal(whole.loss) and all(grads[name].equal(gradients[name]) for name in grads)


@ON_BOTH
def test_those_of_masked_tokens_change_nothing(function):
    for settings in ({}, {"level": "sequence"}, {"beta": 0.1}):
        results = []
        for value in (0.0, -3.0):
            advantages = ADVANTAGES.clone()
            advantages[list(MASKED)] = value
            case = token_case(OLD, REF, advantages=advantages)
            results.append(run_loss(function, case, config_of(**settings)))
        (one, gradients), (other, same) = results
        assert one.loss.equal(other.loss) and all(same[name].equal(gradients[name]) for name in same)


def test_normalisers_count_tokens_without_an_advantage():
    """On-policy, with advantage 1 on one token, the loss is minus the weight of that token."""
    case = token_case(advantages=torch.eye(N)[9])
    for loss_type, weight in {"grpo": 1 / (5 * B), "bnpo": 1 / (N - 3), "dr_grpo": 1 / (6 * B), "luspo": 1 / B}.items():
        output, _ = run_loss(linear_grpo_loss, case, config_of(loss_type))
        assert output.loss.item() == pytest.approx(-weight)
        output, _ = run_loss(linear_grpo_loss, case | {"denominator": 2.5}, config_of(loss_type))
        assert output.loss.item() == pytest.approx(-(1 / 5 if loss_type == "grpo" else 1) / 2.5)


def test_as_many_completions_as_tokens_have_one_each():
    """With B = N, advantages are per completion: the second completion is empty, so its advantage is unused."""
    case = token_case(masked=()) | {"advantages": torch.tensor([1.0, 5.0, 0.0], device=DEVICE)}
    case |= {name: case[name][:3] for name in ("hidden", "targets", "mask")}
    case["cu_seqlens"] = torch.tensor([0, 2, 2, 3], device=DEVICE)
    for function in FUNCTIONS:
        output, _ = run_loss(function, case, GRPOLossConfig())
        assert output.loss.item() == pytest.approx(-1 / 3) and output.stats["live_tokens"] == 2


def test_micro_batches_add_up(monkeypatch):
    """One micro-batch has an advantage per completion, the other one per token."""
    advantages = ADVANTAGES.clone()
    advantages[:5] = torch.tensor([0.5] * 4 + [-1.0])
    for config in (config_of(), config_of("vespo")):
        case = token_case(OLD, SAMPLER, advantages=advantages)
        force(monkeypatch, "chunks")
        whole, exact = run_loss(linear_grpo_loss, case | {"denominator": 6}, config)
        parts = []
        for first, last in ((0, 2), (2, 6)):
            rows = slice(BOUNDS[first], BOUNDS[last])
            part = {name: case[name][rows] for name in ("hidden", "targets", "mask", "advantages", OLD, SAMPLER)}
            part |= {"weight": case["weight"], "cu_seqlens": case["cu_seqlens"][first : last + 1] - BOUNDS[first]}
            if first == 0:
                part["advantages"] = torch.tensor([0.5, -1.0], device=DEVICE)
            parts.append(run_loss(linear_grpo_loss, part | {"denominator": 6}, config))
        torch.testing.assert_close(sum(output.loss for output, _ in parts), whole.loss)
        torch.testing.assert_close(torch.cat([grads["hidden"] for _, grads in parts]), exact["hidden"])
        torch.testing.assert_close(sum(grads["weight"] for _, grads in parts), exact["weight"])


# ---- bad input


@pytest.mark.parametrize(
    "advantages, message",
    [
        (
            torch.zeros(N + 1),
            rf"shape \({N + 1},\): it must be \({B},\), .* cu_seqlens, or \({N},\), one per row of hidden",
        ),
        (torch.zeros(N, 1), rf"shape \({N}, 1\): it must be \({B},\)"),
        (torch.zeros(0), r"shape \(0,\): it must be"),
        (ADVANTAGES.where(torch.arange(N) != MASKED[0], torch.nan), r"advantages\[2\] = nan is not finite"),
        (ADVANTAGES.where(torch.arange(N) != 13, -torch.inf), r"advantages\[13\] = -inf is not finite"),
    ],
    ids=range(5),
)
def test_bad_ones_are_named(advantages, message, monkeypatch):
    monkeypatch.setattr(sweep, "backend", None)
    with pytest.raises(InputError, match=message):
        linear_grpo_loss(**token_case(advantages=advantages))
