"""Policies: prompt orders, advantage shapers and objectives."""

import pytest
import torch

from toolx_kernels.ops.advantages import group_advantages
from toolx_kernels.rollout.rollout import Rollout
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.groups import RAW, GroupPlan, ScoredGroup
from toolx_kernels.train.hard_sampling import HardSamples
from toolx_kernels.train.policies.advantages import DifficultyWeighted, GroupRelative
from toolx_kernels.train.policies.loss import ClippedLoss
from toolx_kernels.train.policies.prompt_order import DynamicSampling, EpochOrder

NOTHING = HardSamples([])  # a table that knows no rows


def scored(rewards):
    rollouts = [Rollout([1, 2], [-1.0, -1.0], [0.5, 0.5], None, "", [], "stop") for _ in rewards]
    n, solved = len(rewards), [reward >= 1 for reward in rewards]
    return ScoredGroup(GroupPlan(0), [3], rollouts, [RAW] * n, [False] * n, list(rewards), {}, solved, solved)


@pytest.mark.parametrize("order_of", [EpochOrder, DynamicSampling])
def test_an_epoch_is_a_permutation_in_equal_batches(order_of):
    order = order_of(count=11, size=3, seed=0)
    epochs = [[order.rows(3 * epoch + place, NOTHING) for place in range(3)] for epoch in range(4)]
    for epoch in epochs:
        flat = [row for batch in epoch for row in batch]
        assert len(set(flat)) == 9 and set(flat) <= set(range(11)) and all(len(batch) == 3 for batch in epoch)
    assert epochs[0] != epochs[1]
    rows = order.rows(5, NOTHING)
    assert (
        rows
        == order_of(count=11, size=3, seed=0).rows(5, NOTHING)
        != order_of(count=11, size=3, seed=1).rows(5, NOTHING)
    )


def test_fewer_rows_than_a_batch_are_one_batch():
    assert sorted(EpochOrder(count=2, size=8, seed=0).rows(3, NOTHING)) == [0, 1]


def test_a_round_of_a_billion_epochs_has_the_rows_of_a_few():
    assert EpochOrder(count=5, size=2, seed=0).candidates(range(10**9)) == list(range(5))
    assert EpochOrder(count=5, size=9, seed=0).candidates(range(10**9)) == list(range(5))


def test_dynamic_sampling_drops_groups_of_equal_reward_by_comparing_them():
    dapo = DynamicSampling(count=4, size=2, seed=0)
    assert dapo.max_batches == 10 and EpochOrder(count=4, size=2, seed=0).max_batches == 1
    assert not dapo.keeps(scored([0.1] * 7)), "the float32 mean of seven 0.1 is not 0.1"
    assert dapo.keeps(scored([1.0, 1.0, 1.01]))
    assert EpochOrder(count=4, size=2, seed=0).keeps(scored([0.0, 0.0]))


def test_advantages_are_relative_to_the_group_whatever_its_size():
    groups = [scored([1.0, 0.0, 0.0]), scored([1.0, 1.0, 0.0, 0.0, 0.0, 0.0])]
    shaped = GroupRelative()(groups)
    for group, part in zip(groups, shaped.split([3, 6]), strict=True):
        torch.testing.assert_close(part, group_advantages(torch.tensor(group.rewards), group_size=len(part)))


def test_the_bonus_keeps_its_size_where_everything_else_is_equal():
    """Rewards 1, 1, 1, 1, 1.01: normalized by std, the last would get 1.75, as much as a lone success."""
    group = scored([1.0, 1.0, 1.0, 1.0, 1.01])
    trap = GroupRelative(min_std=0.0)([group])
    floored = GroupRelative(min_std=ToolExpanderConfig().settled().min_reward_std)([group])
    assert float(trap[-1]) == pytest.approx(1.75, abs=0.02)
    assert float(floored[-1]) == pytest.approx(0.08, abs=0.001)
    zero_one = scored([1.0, 0.0, 0.0, 0.0, 0.0])
    assert torch.equal(GroupRelative(min_std=0.1)([zero_one]), GroupRelative()([zero_one]))


def test_the_least_std_is_a_groups_own():
    rare = [scored([1.0] + [0.0] * 3)] + [scored([0.0] * 4) for _ in range(60)]
    plain, floored = (GroupRelative("batch", min_std)(rare) for min_std in (0.0, 0.1))
    assert torch.equal(plain, floored) and plain.max() > 10


def test_difficulty_weights_follow_observe_r1():
    groups = [scored([1.0, 0.0, 0.0, 0.0]), scored([1.0, 1.0, 0.0, 0.0]), scored([1.0, 1.0, 1.0, 1.5])]
    plain, weighted = GroupRelative()(groups), DifficultyWeighted(GroupRelative())(groups)
    for place, share in enumerate((0.25, 0.5, 1.0)):
        weight = 4 * 1.8 * share * (1 - share)
        torch.testing.assert_close(weighted[4 * place : 4 * place + 4], weight * plain[4 * place : 4 * place + 4])
    assert torch.equal(weighted[8:], torch.zeros(4)), "what is always right teaches nothing, bonus or not"


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
def test_cutting_a_batch_does_not_change_the_loss(loss_type):
    """With the denominator of the whole batch, micro-batches add up for every objective."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=generator) for shape in ((9, 8), (20, 8)))
    targets = torch.randint(20, (9,), generator=generator)
    lengths, advantages = [4, 1, 2, 2], torch.tensor([1.0, -0.5, 0.3, -0.8])
    loss = ClippedLoss(ToolExpanderConfig(loss_type=loss_type, max_completion_length=6).loss)
    denominator = loss.denominator(lengths)

    def of(first, last):
        bounds = torch.tensor([0, *lengths[first:last]]).cumsum(0).int()
        tokens = slice(sum(lengths[:first]), sum(lengths[:last]))
        return loss(
            hidden[tokens],
            weight=weight,
            targets=targets[tokens],
            cu_seqlens=bounds,
            advantages=advantages[first:last],
            ref_logprobs=None,
            mask=None,
            denominator=denominator,
        ).loss

    torch.testing.assert_close(of(0, 4), of(0, 1) + of(1, 3) + of(3, 4))
    without = loss(
        hidden, weight=weight, targets=targets, cu_seqlens=torch.tensor([0, 4, 5, 7, 9]).int(), advantages=advantages
    )
    torch.testing.assert_close(of(0, 4), without.loss, msg="it is the objective's own normaliser")
