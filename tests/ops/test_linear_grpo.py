"""Advantages and the clipped GRPO loss against their float64 definitions."""

import itertools

import pytest
import torch

from toolx_kernels import reference
from toolx_kernels.errors import InputError
from toolx_kernels.ops import tiles
from toolx_kernels.ops.advantages import group_advantages
from toolx_kernels.ops.linear_grpo import linear_grpo_loss
from toolx_kernels.reference import GRPOLossConfig

LENGTHS = [5, 1, 9, 4, 0, 3, 7, 2]  # of the completions of two groups of four; one is empty
REWARDS = [1.0, 0.0, 0.0, 1.0, 1.0, 0.2, 0.0, 1.0]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "CPU_TILE_BYTES", 4096)


def make_case(dtype=torch.float64, rewards=REWARDS, masked=(), vocab=101, dim=12):
    g = torch.Generator().manual_seed(0)
    n = sum(LENGTHS)
    mask = torch.ones(n, dtype=torch.bool)
    mask[list(masked)] = False
    hidden, weight = torch.randn(n, dim, generator=g).to(dtype), torch.randn(vocab, dim, generator=g).to(dtype)
    targets = torch.randint(vocab, (n,), generator=g)
    own = reference.linear_logprob(hidden, weight, targets).logprobs
    return {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        "cu_seqlens": torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32),
        "rewards": torch.tensor(rewards, dtype=torch.float64),
        "group_size": 4,
        "old_logprobs": own + 0.3 * torch.randn(n, generator=g),
        "ref_logprobs": own + 0.5 * torch.randn(n, generator=g),
        "sampler_logprobs": own + 0.5 * torch.randn(n, generator=g),
        "mask": mask,
    }


def run(function, case, config, keep=()):
    used = {k: v for k, v in case.items() if not k.endswith("_logprobs") or k in keep}
    leaves = {name: used[name].clone().requires_grad_() for name in ("hidden", "weight")}
    output = function(**(used | leaves), config=config)
    return output, torch.autograd.grad(output.loss, leaves.values())


LOGPROBS = ("old_logprobs", "ref_logprobs", "sampler_logprobs")
CONFIGS = {
    "on-policy": (GRPOLossConfig(), ()),
    "off-policy": (GRPOLossConfig(epsilon_high=0.26), ("old_logprobs",)),
    "bnpo": (GRPOLossConfig(loss_type="bnpo"), ("old_logprobs",)),
    "dr_grpo": (GRPOLossConfig(loss_type="dr_grpo", max_completion_length=16, scale_rewards="none"), ("old_logprobs",)),
    "dapo": (GRPOLossConfig(loss_type="dapo", scale_rewards="batch"), ("old_logprobs",)),
    "two-sided": (GRPOLossConfig(delta=1.4), ("old_logprobs",)),
    "sequence": (GRPOLossConfig(importance_sampling_level="sequence", epsilon=0.05), ("old_logprobs",)),
    "kl": (GRPOLossConfig(beta=0.1), ("old_logprobs", "ref_logprobs")),
    "sampler": (GRPOLossConfig(importance_sampling_cap=1.2), ("old_logprobs", "sampler_logprobs")),
    "sampler and kl": (GRPOLossConfig(beta=0.1, importance_sampling_cap=1.2), LOGPROBS),
    "two-sided sequence": (GRPOLossConfig(importance_sampling_level="sequence", delta=1.3), ("old_logprobs",)),
    "hot": (GRPOLossConfig(temperature=1.7), ()),
}


@pytest.mark.parametrize(
    "masked", [(), (0, 1, 5, 20), tuple(range(5, 19))], ids=["full", "holes", "two rows all masked"]
)
@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_the_definition(name, masked):
    config, keep = CONFIGS[name]
    case = make_case(masked=masked)
    truth, true_grads = run(reference.linear_grpo_loss, case, config, keep)
    ours, grads = run(linear_grpo_loss, case, config, keep)
    torch.testing.assert_close(ours.loss, truth.loss, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(grads, true_grads, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(ours.logprobs, truth.logprobs, equal_nan=True)
    torch.testing.assert_close(ours.entropy, truth.entropy, equal_nan=True)
    assert ours.stats.keys() == truth.stats.keys()
    for key, value in truth.stats.items():
        torch.testing.assert_close(ours.stats[key].double(), value.double(), msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_torch_in_the_same_dtype(dtype):
    config, keep = CONFIGS["kl"]
    case = make_case(dtype)
    double = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in case.items()}
    truth, true_grads = run(reference.linear_grpo_loss, double, config, keep)
    plain, plain_grads = run(reference.linear_grpo_loss, case, config, keep)
    ours, grads = run(linear_grpo_loss, case, config, keep)
    assert (ours.loss - truth.loss).abs() <= (plain.loss - truth.loss).abs() + 2e-6 * truth.loss.abs()
    for mine, theirs, true in zip(grads, plain_grads, true_grads, strict=True):
        assert (mine - true).abs().max() <= (theirs - true).abs().max() + 2e-6 * true.abs().max()


def test_by_hand():
    """Two completions of one and two tokens, uniform over four tokens, rewards 1 and 0, ratio 1: the loss is the
    negative mean advantage, zero, and its gradient with respect to each log-prob is -A / (length * B)."""
    hidden = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64)
    out = linear_grpo_loss(
        hidden, weight, torch.tensor([0, 2, 3]),
        cu_seqlens=torch.tensor([0, 1, 3]), rewards=torch.tensor([1.0, 0.0]), group_size=2,
        config=GRPOLossConfig(scale_rewards="none"),
    )  # fmt: skip
    assert out.loss.item() == pytest.approx(0.0)
    torch.testing.assert_close(out.logprobs, torch.full((3,), 0.25, dtype=torch.float64).log())
    out.loss.backward()
    # d logp / d hidden = weight[target] - mean(weight) = weight[target]
    expected = torch.stack([weight[0] * -0.5 / 2, weight[2] * 0.5 / 4, weight[3] * 0.5 / 4])
    torch.testing.assert_close(hidden.grad, expected)


def test_micro_batches_add_up():
    """With the batch's denominator the loss and gradient do not depend on how the batch is cut."""
    config, _ = CONFIGS["on-policy"]
    case = make_case()
    whole, whole_grads = run(linear_grpo_loss, case, config)
    total, parts = 0.0, []
    bounds = case["cu_seqlens"].tolist()
    for group in (0, 1):
        rows = slice(bounds[4 * group], bounds[4 * group + 4])
        part = {
            "hidden": case["hidden"][rows], "weight": case["weight"], "targets": case["targets"][rows],
            "cu_seqlens": case["cu_seqlens"][4 * group : 4 * group + 5] - bounds[4 * group],
            "rewards": case["rewards"][4 * group : 4 * group + 4], "group_size": 4, "denominator": 8,
        }  # fmt: skip
        output, grads = run(linear_grpo_loss, part, config)
        total += output.loss
        parts.append(grads)
    torch.testing.assert_close(total, whole.loss)
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), whole_grads[0])
    torch.testing.assert_close(sum(p[1] for p in parts), whole_grads[1])


def test_groups_of_equal_reward_are_not_computed_and_change_nothing():
    case = make_case(rewards=[1.0] * 4 + [1.0, 0.2, 0.0, 1.0])
    ours, grads = run(linear_grpo_loss, case, GRPOLossConfig())
    every, same_grads = run(linear_grpo_loss, case, GRPOLossConfig(compute_all_logprobs=True))
    first_group = sum(LENGTHS[:4])
    assert ours.logprobs[:first_group].isnan().all() and ours.logprobs[first_group:].isfinite().all()
    assert every.logprobs.isfinite().all() and every.entropy.isfinite().all()
    torch.testing.assert_close(grads, same_grads)
    torch.testing.assert_close(ours.loss, every.loss)
    assert (grads[0][:first_group] == 0).all()


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_tokens_and_completions_without_gradient_count_in_the_normaliser(loss_type):
    """And a denominator that is given replaces it."""
    config = GRPOLossConfig(loss_type=loss_type, max_completion_length=16)
    case = make_case(rewards=[1.0] * 4 + [1.0, 0.2, 0.0, 1.0], masked=(2, 25))
    ours, _ = run(linear_grpo_loss, case, config)
    truth, _ = run(reference.linear_grpo_loss, case, config)
    torch.testing.assert_close(ours.loss, truth.loss, rtol=1e-11, atol=1e-13)
    tokens = sum(LENGTHS) - 2
    normaliser = {"grpo": 8, "bnpo": tokens, "dapo": tokens, "dr_grpo": 8 * 16}[loss_type]
    for function in (linear_grpo_loss, reference.linear_grpo_loss):
        given, _ = run(function, case | {"denominator": 3 * normaliser}, config)
        torch.testing.assert_close(3 * given.loss, truth.loss, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("gap", [-200.0, 200.0, torch.inf])
@pytest.mark.parametrize("name", ["off-policy", "two-sided", "sequence"])
def test_ratios_that_overflow_leave_finite_gradients(name, gap):
    config, _ = CONFIGS[name]
    case = make_case(torch.float32)
    case["old_logprobs"] = case["old_logprobs"] - gap
    for function in (linear_grpo_loss, reference.linear_grpo_loss):
        output, grads = run(function, case, config, ("old_logprobs",))
        assert output.loss.isfinite() and all(grad.isfinite().all() for grad in grads)


def test_what_was_left_out_may_be_fed_back():
    """.logprobs is NaN on rows without a gradient, and is what the next update starts its ratios from."""
    case = make_case(rewards=[1.0] * 4 + [1.0, 0.2, 0.0, 1.0])
    expected, expected_grads = run(linear_grpo_loss, case, GRPOLossConfig())
    case["old_logprobs"] = case["sampler_logprobs"] = expected.logprobs
    for function in (linear_grpo_loss, reference.linear_grpo_loss):
        for config in (GRPOLossConfig(), GRPOLossConfig(compute_all_logprobs=True)):
            output, grads = run(function, case, config, ("old_logprobs", "sampler_logprobs"))
            torch.testing.assert_close(output.loss, expected.loss)
            torch.testing.assert_close(grads, expected_grads)
        output, grads = run(function, case, GRPOLossConfig(beta=0.1), LOGPROBS)
        assert output.loss.isfinite() and all(grad.isfinite().all() for grad in grads)


def test_old_logprobs_with_a_graph_do_not_cancel_the_gradient():
    case = make_case()
    hidden = case["hidden"].clone().requires_grad_()
    old = reference.linear_logprob(hidden, case["weight"], case["targets"]).logprobs
    arguments = {k: v for k, v in case.items() if not k.endswith("_logprobs")} | {"hidden": hidden}
    (attached,) = torch.autograd.grad(linear_grpo_loss(**arguments, old_logprobs=old).loss, hidden)
    (detached,) = torch.autograd.grad(linear_grpo_loss(**arguments).loss, hidden)
    torch.testing.assert_close(attached, detached)
    assert attached.abs().sum() > 0


def test_nothing_live_gives_a_zero_loss_that_backward_accepts():
    for change in ({"rewards": torch.ones(8)}, {"mask": torch.zeros(sum(LENGTHS), dtype=torch.bool)}):
        for function in (linear_grpo_loss, reference.linear_grpo_loss):
            output, grads = run(function, make_case() | change, GRPOLossConfig())
            assert output.loss.item() == 0
            assert all((grad == 0).all() for grad in grads)
            assert output.logprobs.isnan().all()


def test_masked_rows_may_hold_any_target():
    case = make_case(masked=(3,))
    expected, _ = run(linear_grpo_loss, case, GRPOLossConfig())
    case["targets"] = case["targets"].clone()
    case["targets"][3] = -100
    actual, _ = run(linear_grpo_loss, case, GRPOLossConfig())
    assert torch.equal(actual.loss, expected.loss)


def test_temperature_per_row_is_the_config_temperature_when_equal():
    case = make_case()
    expected, _ = run(linear_grpo_loss, case, GRPOLossConfig(temperature=1.7))
    actual, _ = run(linear_grpo_loss, case | {"temperature": torch.full((sum(LENGTHS),), 1.7)}, GRPOLossConfig())
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "change, config, message",
    [
        ({"rewards": None}, {}, "either rewards or advantages"),
        ({"advantages": torch.zeros(8)}, {}, "either rewards or advantages"),
        ({"rewards": torch.zeros(7)}, {}, r"rewards has shape \(7,\): it must be \(8,\)"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, {}, r"mask has shape \(3,\)"),
        ({"cu_seqlens": torch.tensor([0, 5])}, {}, "must rise from 0 to N = 31"),
        ({"cu_seqlens": torch.tensor([0, 9, 5, 31])}, {}, "must rise from 0 to N = 31"),
        ({}, {"beta": 0.1}, "beta=0.1 needs ref_logprobs"),
        ({"mask": torch.ones(sum(LENGTHS), dtype=torch.int64)}, {}, r"mask is torch.int64: pass mask.bool\(\)"),
        ({"rewards": None, "advantages": torch.full((8,), torch.nan)}, {}, r"advantages\[0\] = nan is not finite"),
    ],
)
def test_bad_input_is_named(change, config, message):
    case = {k: v for k, v in make_case().items() if not k.endswith("_logprobs")}
    with pytest.raises(InputError, match=message):
        linear_grpo_loss(**(case | change), config=GRPOLossConfig(**config))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"loss_type": "ppo"}, "loss_type='ppo' is unknown"),
        ({"epsilon": -0.1}, "epsilon=-0.1 must not be negative"),
        ({"epsilon": 1.0}, "epsilon=1.0 must be below 1"),
        ({"importance_sampling_cap": -1.0}, "importance_sampling_cap=-1.0 must be positive"),
        ({"temperature": 0}, "temperature=0 must be positive and finite"),
        ({"delta": 1.1}, "delta=1.1 must exceed"),
        ({"loss_type": "dr_grpo"}, "max_completion_length"),
    ],
)
def test_a_config_that_cannot_work_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        GRPOLossConfig(**settings)


# ---- advantages


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("ids", [None, [3, 9, 3, 3, 9, -1, 9, 3]], ids=["size", "ids"])
def test_advantages_agree_with_the_definition(scale, ids):
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    groups = {"group_size": 4} if ids is None else {"group_ids": torch.tensor(ids)}
    expected = reference.group_advantages(rewards, **groups, scale=scale)
    torch.testing.assert_close(group_advantages(rewards, **groups, scale=scale), expected)
    assert expected.abs().sum() > 0


def test_advantages_by_hand():
    # mean 1/4, unbiased std 1/2
    actual = group_advantages(torch.tensor([1.0, 0, 0, 0]), group_size=4, eps=0.0)
    torch.testing.assert_close(actual, torch.tensor([1.5, -0.5, -0.5, -0.5]))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_give_exact_zeros(scale):
    """In fp32 the mean of three times 0.1 is not 0.1, and a tiny std would blow the difference up."""
    for function in (group_advantages, reference.group_advantages):
        rewards = torch.tensor([0.1] * 3 + [0.0, 1.0, 0.3])
        advantages = function(rewards, group_size=3, scale=scale, eps=0.0)
        assert (advantages[:3] == 0).all() and (advantages[3:] != 0).all()
        assert (function(rewards[:3], group_size=1, scale=scale) == 0).all()


def test_the_bonus_trap():
    """0.01 more in an all-correct group of five is an advantage of about 1.75 after std-normalisation."""
    advantages = group_advantages(torch.tensor([1, 1, 1, 1, 1.01]), group_size=5)
    assert advantages[-1] == pytest.approx(1.75, abs=0.02)
    assert group_advantages(torch.tensor([1, 1, 1, 1, 1.01]), group_size=5, scale="none")[-1] == pytest.approx(
        0.008, rel=1e-4
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"group_size": 3}, "group_size=3 does not divide the 8"),
        ({"group_size": 4, "group_ids": torch.zeros(8)}, "either group_size or group_ids"),
        ({"group_ids": torch.zeros(3)}, "one entry for each of the 8"),
        ({"group_size": 4, "scale": "std"}, "scale='std' is unknown"),
    ],
)
def test_advantages_name_bad_input(arguments, message):
    with pytest.raises(InputError, match=message):
        group_advantages(torch.tensor(REWARDS), **arguments)
    with pytest.raises(InputError, match=r"rewards\[1\] = nan"):
        group_advantages(torch.tensor([1.0, torch.nan]), group_size=2)
