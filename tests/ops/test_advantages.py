"""Group-relative advantages against their float64 definition."""

import pytest
import torch

from tests.ops.cases import DEVICE, REWARDS, needs_triton
from toolx_kernels import reference
from toolx_kernels.errors import InputError
from toolx_kernels.ops import advantages
from toolx_kernels.ops.advantages import group_advantages

SCALES = ["group", "batch", "none"]


def rewards_of(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("ids", [None, [3, 9, 3, 3, 9, -1, 9, 3]], ids=["size", "ids"])
def test_they_agree_with_the_definition(scale, ids, dtype):
    groups = {"group_size": 4} if ids is None else {"group_ids": torch.tensor(ids, device=DEVICE)}
    expected = reference.group_advantages(rewards_of(*REWARDS, dtype=torch.float64), **groups, scale=scale)
    actual = group_advantages(rewards_of(*REWARDS, dtype=dtype), **groups, scale=scale)
    assert actual.dtype == dtype and expected.abs().sum() > 0
    torch.testing.assert_close(actual.double(), expected, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("sizes", [(1, 300), (300, 1), (37, 4), (2, 1030)], ids=str)
def test_many_and_large_groups(sizes, scale):
    n_groups, group_size = sizes
    g = torch.Generator().manual_seed(0)
    rewards = torch.randint(3, (n_groups * group_size,), generator=g).double()
    expected = reference.group_advantages(rewards, group_size=group_size, scale=scale)
    actual = group_advantages(rewards.float().to(DEVICE), group_size=group_size, scale=scale)
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=1e-5, atol=2e-6)
    order = torch.randperm(len(rewards), generator=g)
    ids = (torch.arange(len(rewards)) // group_size * 7 - 3)[order]
    shuffled = group_advantages(rewards[order].float().to(DEVICE), group_ids=ids.to(DEVICE), scale=scale)
    torch.testing.assert_close(shuffled.cpu().double(), expected[order], rtol=1e-5, atol=2e-6)


def test_by_hand():
    # mean 1/4, unbiased std 1/2
    actual = group_advantages(rewards_of(1, 0, 0, 0), group_size=4, eps=0.0)
    torch.testing.assert_close(actual, rewards_of(1.5, -0.5, -0.5, -0.5))


@pytest.mark.parametrize("scale", SCALES)
def test_equal_rewards_give_exact_zeros(scale):
    """In fp32 the mean of three values 0.1 is not 0.1, and a tiny std would amplify the difference."""
    for function in (group_advantages, reference.group_advantages):
        rewards = rewards_of(0.1, 0.1, 0.1, 0.0, 1.0, 0.3)
        advantages = function(rewards, group_size=3, scale=scale, eps=0.0)
        assert (advantages[:3] == 0).all() and (advantages[3:] != 0).all()
        assert (function(rewards[:3], group_size=1, scale=scale) == 0).all()


def test_large_rewards_that_hardly_differ():
    rewards = rewards_of(1000.0, 1000.0, 1000.0, 1000.125, dtype=torch.float32)
    expected = reference.group_advantages(rewards.double(), group_size=4)
    torch.testing.assert_close(group_advantages(rewards, group_size=4).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", ["group", "batch"])
@pytest.mark.parametrize("size", [1e20, 3e38])
def test_rewards_whose_squares_are_not_finite_in_fp32(scale, size):
    rewards = rewards_of(1, -1, -1, 1, dtype=torch.float32)
    expected = group_advantages(rewards.double(), group_size=4, scale=scale, eps=0.0).float()
    assert expected.abs().min() > 0.8
    functions = [group_advantages, reference.group_advantages]
    if advantages.triton is not None:
        functions.append(lambda rewards, **_: advantages.in_triton(rewards, 4, None, scale, 0.0, 0.0))
    for function in functions:
        torch.testing.assert_close(function(rewards * size, group_size=4, scale=scale, eps=0.0), expected)
    with pytest.raises(InputError, match=r"rewards\[0\] = 1e\+39 is not finite in fp32"):
        group_advantages(rewards_of(1e39, 0, dtype=torch.float64), group_size=2)


def test_integer_and_half_precision_rewards():
    expected = group_advantages(rewards_of(1, 0, 0, 1), group_size=4)
    for dtype in (torch.int64, torch.bfloat16, torch.bool):
        actual = group_advantages(torch.tensor([1, 0, 0, 1], dtype=dtype, device=DEVICE), group_size=4)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("scale", SCALES)
def test_memory_grows_with_the_batch_and_not_with_its_square(scale):
    rewards, order = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)), torch.randperm(1 << 16)
    by_size = advantages.in_torch(rewards, 2, None, scale, 1e-4, 0.0)  # a matrix of groups by rewards has 17 GB
    by_id = advantages.in_torch(rewards[order], 0, order // 2 * 3 - 7, scale, 1e-4, 0.0)
    torch.testing.assert_close(by_id, by_size[order], rtol=1e-6, atol=1e-6)
    expected = reference.group_advantages(rewards[:64].double(), group_size=2, scale="group")
    if scale == "group":
        torch.testing.assert_close(by_size[:64].double(), expected, rtol=1e-6, atol=1e-6)


def test_whole_numbers_that_fp32_does_not_hold():
    actual = group_advantages(torch.tensor([2**24, 2**24 + 1], device=DEVICE), group_size=2, eps=0.0)
    assert torch.equal(actual, rewards_of(-(0.5**0.5), 0.5**0.5))


@pytest.mark.parametrize("scale", ["group", "batch"])
@pytest.mark.parametrize("size", [1e-200, 5e-324])
def test_rewards_whose_squares_underflow(scale, size):
    actual = group_advantages(rewards_of(0, size, size, 0, dtype=torch.float64), group_size=4, scale=scale, eps=0.0)
    assert actual.isfinite().all() and actual.abs().max() > 0.5
    small = group_advantages(rewards_of(0, size, dtype=torch.float64), group_size=2, scale=scale)
    assert (small.abs() < 1e-190).all()


def test_the_bonus_trap():
    """A bonus of 0.01 in an all-correct group of five becomes an advantage of about 1.75 when divided by the std."""
    rewards = rewards_of(1, 1, 1, 1, 1.01)
    assert group_advantages(rewards, group_size=5)[-1].item() == pytest.approx(1.75, abs=0.02)
    assert group_advantages(rewards, group_size=5, scale="none")[-1].item() == pytest.approx(0.008, rel=1e-4)


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_a_lowest_std_keeps_the_bonus_small(scale):
    rewards = rewards_of(1, 1, 1, 1, 1.01)
    for function in (group_advantages, reference.group_advantages):
        bounded = function(rewards, group_size=5, scale=scale, min_std=0.1)
        assert bounded[-1].item() == pytest.approx(0.008 / 0.1001, rel=1e-4)
        unbounded = function(rewards, group_size=5, scale=scale)
        assert torch.equal(function(rewards, group_size=5, scale=scale, min_std=0.004), unbounded)
        assert (function(rewards_of(0.1, 0.1, 0.1), group_size=3, scale=scale, min_std=0.1) == 0).all()


def test_a_lowest_std_leaves_groups_of_0_and_1_as_they_are():
    for size in range(2, 65):
        rewards = (torch.arange(size) < torch.arange(size + 1)[:, None]).float().flatten().to(DEVICE)
        for function in (group_advantages, reference.group_advantages):
            unbounded = function(rewards, group_size=size)
            assert torch.equal(function(rewards, group_size=size, min_std=0.1), unbounded)


@needs_triton
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("min_std", [0.0, 0.55, 0.7])  # 0.55 lies between the stds of the two groups
def test_the_kernel_agrees_with_the_definition(scale, min_std):
    rewards = rewards_of(*REWARDS)
    for size, ids in ((4, None), (0, torch.tensor([3, 9, 3, 3, 9, -1, 9, 3], device=DEVICE))):
        groups = {"group_size": size} if ids is None else {"group_ids": ids}
        expected = reference.group_advantages(rewards.double(), **groups, scale=scale, min_std=min_std)
        actual = advantages.in_triton(rewards, size, ids, scale, 1e-4, min_std)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"group_size": 3}, "group_size=3 does not divide the 8"),
        ({"group_size": 0}, "group_size=0 must be at least 1"),
        ({}, "either group_size or group_ids"),
        ({"group_size": 4, "group_ids": torch.zeros(8)}, "either group_size or group_ids"),
        ({"group_ids": torch.zeros(3)}, "one entry for each of the 8"),
        ({"group_size": 4, "scale": "std"}, "scale='std' is unknown"),
        ({"group_size": 4, "min_std": -0.1}, "min_std=-0.1 must lie in"),
        ({"group_size": 4, "min_std": torch.inf}, "min_std=inf must lie in"),
        ({"group_size": 4, "min_std": torch.nan}, "min_std=nan must lie in"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(InputError, match=message):
        group_advantages(torch.tensor(REWARDS), **arguments)
    for value in (torch.nan, torch.inf):
        with pytest.raises(InputError, match=rf"rewards\[1\] = {value}"):
            group_advantages(torch.tensor([1.0, value]), group_size=2)
    with pytest.raises(InputError, match=r"rewards \(\) must be one number per completion"):
        group_advantages(torch.tensor(1.0), group_size=1)
