"""Advantage shapers, compared with batches computed by hand."""

from dataclasses import dataclass

import pytest
import torch

from toolx_kernels.errors import InputError
from toolx_kernels.rollout.rollout import Rollout
from toolx_kernels.toolcall import Row
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.groups import RAW, GroupPlan, Help, ScoredGroup
from toolx_kernels.train.policies.advantages import (
    DifficultyWeighted,
    GroupRelative,
    Routed,
    SuccessesOnly,
    ZeroVariance,
    chosen_advantage_shaper,
    give_advantages,
)

SHOWN = Help((Row("demonstration", "p", [], []),))


def group(entropies, rewards, *, retried=None, shown=None, scored_with=RAW, masks=None):
    """A group with one rollout per list of entropies, which has one entropy per token."""
    rollouts = [
        Rollout(list(range(len(one))), [-1.0] * len(one), one, mask, "", [], "stop")
        for one, mask in zip(entropies, masks or [None] * len(entropies), strict=True)
    ]
    return ScoredGroup(
        GroupPlan(0, scored_with=scored_with),
        [3],
        rollouts,
        shown=shown or [scored_with] * len(rewards),
        retried=retried or [False] * len(rewards),
        rewards=rewards,
        correct=[reward >= 1 for reward in rewards],
        solved=[reward >= 1 for reward in rewards],
    )


def helped(entropies, rewards, retried, **others):
    """A group of failures on the raw prompt and their retries with help."""
    return group(entropies, rewards, retried=retried, shown=[SHOWN if again else RAW for again in retried], **others)


@dataclass(frozen=True)
class Given:
    """A shaper that returns the given advantages."""

    advantages: torch.Tensor

    def __call__(self, groups):
        return self.advantages


LIVE = group([[0.5, 0.2], [0.3]], [1.0, 0.0])
SOLVED = group([[0.5, 0.25], [0.0, 1.0, 0.75]], [1.0, 1.0])
DEAD = group([[0.5, 0.25, 0.0], [0.75]], [0.0, 0.0])
HALF = group([[0.5], [0.25, 0.5]], [0.5, 0.5])  # not solved either
REVIVED = helped([[0.9], [0.8, 0.1], [0.5, 0.0, 0.25], [0.7]], [0.0, 0.0, 1.0, 0.0], [False, False, True, True])
FAILED_AGAIN = helped([[0.9], [0.8, 0.1]], [0.0, 0.5], [False, True])
BATCH = [LIVE, SOLVED, DEAD, HALF, REVIVED, FAILED_AGAIN]
LENGTHS = [2, 1, 2, 3, 3, 1, 1, 2, 1, 2, 3, 1, 1, 2]
PLAIN = GroupRelative()(BATCH)


def test_zero_variance_shapes_groups_of_equal_reward_and_no_others():
    shaped = ZeroVariance(GroupRelative())(BATCH)
    expected = [
        *[0.05, 0.025], *[0.0, 0.1, 0.075],  # solved: .1 H
        *[0.0, -0.025, -0.05], 0.0,  # dead: -.1 (max H - H)
        0.0, *[-0.025, 0.0],
    ]  # fmt: skip
    torch.testing.assert_close(shaped[3:15], torch.tensor(expected), rtol=0, atol=1e-8)
    per_token = PLAIN.repeat_interleave(torch.tensor(LENGTHS))
    assert torch.equal(shaped[:3], per_token[:3]) and shaped[0] > 0 > shaped[2]
    assert torch.equal(shaped[15:], per_token[15:]) and shaped[15:].count_nonzero() == 10
    doubled = ZeroVariance(GroupRelative(), alpha=0.2)(BATCH)
    torch.testing.assert_close(doubled[3:15], 2 * shaped[3:15])


def test_zero_variance_leaves_out_what_the_model_did_not_write():
    masks = [[True, False, True], [True, True, False]]
    dead = group([[0.5, 0.0, 0.25], [0.25, 0.75, 0.0]], [0.0, 0.0], masks=masks)
    solved = group([[0.5, 0.0, 0.25], [0.25, 0.75, 0.0]], [1.0, 1.0], masks=masks)
    shaped = ZeroVariance(GroupRelative())([dead, solved])
    expected = [0.0, 0.0, -0.025, -0.05, 0.0, 0.0, 0.05, 0.0, 0.025, 0.025, 0.075, 0.0]
    torch.testing.assert_close(shaped, torch.tensor(expected), rtol=0, atol=1e-8)


def test_routed_groups_imitate_their_solved_retries_alone():
    shaped = Routed(GroupRelative())(BATCH)
    # the largest entropy among the weighted tokens is .5; the step's other tokens do not count
    revived = [0.0, *[0.0, 0.0], *[0.0, 1.0, 0.5], 0.0]
    assert shaped[15:22].tolist() == revived
    per_token = PLAIN.repeat_interleave(torch.tensor(LENGTHS))
    assert torch.equal(shaped[:15], per_token[:15]) and torch.equal(shaped[22:], per_token[22:])
    assert shaped[22:].count_nonzero() == 3, "without a solved retry a group is left to the other shaper"


def test_routed_weights_are_of_the_whole_step():
    more = helped([[0.9], [2.0, 1.0, 0.0]], [0.0, 1.0], [False, True], masks=[None, [True, True, False]])
    assert Routed(GroupRelative())([REVIVED, more]).tolist() == [0, 0, 0, 0.75, 1, 0.875, 0, 0, 0, 0.5, 0]
    certain = helped([[0.9], [0.0, 0.0]], [0.0, 1.0], [False, True])
    assert Routed(GroupRelative())([certain]).tolist() == [0.0, 1.0, 1.0]


def test_a_group_with_a_solved_first_draw_is_not_routed():
    lucky = helped([[0.9], [0.8], [0.5, 0.1]], [1.0, 0.0, 1.0], [False, False, True])
    plain = GroupRelative()([lucky]).repeat_interleave(torch.tensor([1, 1, 2]))
    assert torch.equal(Routed(GroupRelative())([lucky]), plain)


def test_failures_count_nothing_where_rollouts_had_help():
    distilled = group([[0.1, 0.2]] * 3, [1.0, 0.0, 1.0], shown=[SHOWN] * 3)
    replaced = group([[0.1, 0.2]] * 3, [1.0, 0.0, 1.0], scored_with=SHOWN)
    batch = [LIVE, REVIVED, distilled, replaced]
    plain, shaped = GroupRelative()(batch), SuccessesOnly(GroupRelative())(batch)
    kept = torch.tensor([1, 1, 0, 0, 1, 0, 1, 0, 1, 1, 1, 1]).bool()
    assert torch.equal(shaped[kept], plain[kept]) and not shaped[~kept].any()
    assert plain.count_nonzero() == 12


@pytest.mark.parametrize("shaper", [DifficultyWeighted, SuccessesOnly, Routed, ZeroVariance])
def test_shapers_shape_what_others_give_for_each_token(shaper):
    """When all tokens of a rollout have its number, the result is the same as from one number per rollout."""
    lengths = torch.tensor(LENGTHS)
    of_rollouts = shaper(Given(PLAIN))(BATCH)
    if len(of_rollouts) == len(LENGTHS):
        of_rollouts = of_rollouts.repeat_interleave(lengths)
    given = PLAIN.repeat_interleave(lengths)
    assert torch.equal(shaper(Given(given))(BATCH), of_rollouts)
    assert torch.equal(given, PLAIN.repeat_interleave(lengths)), "what is given stays as it is"


def test_groups_get_a_number_for_each_rollout_or_for_each_token():
    batch = [group([[0.1, 0.2], [0.3]], [1.0, 0.0]), group([[0.1]], [1.0])]
    give_advantages(batch, Given(torch.tensor([1.0, 2.0, 3.0])))
    assert [one.advantages for one in batch] == [[1.0, 2.0], [3.0]]
    give_advantages(batch, Given(torch.tensor([1.0, 2.0, 3.0, 4.0])))
    assert [one.advantages for one in batch] == [[[1.0, 2.0], [3.0]], [[4.0]]]
    single = [group([[0.1], [0.2]], [1.0, 0.0])]
    give_advantages(single, ZeroVariance(Given(torch.tensor([1.0, 2.0]))))
    assert single[0].advantages == [1.0, 2.0], "of one token each, they are the rollouts'"
    give_advantages([], Given(torch.tensor([1.0])))


@pytest.mark.parametrize("shape", [(2,), (5,), (3, 1), ()])
@pytest.mark.parametrize("wrapped", [False, True])
def test_other_shapes_are_refused(shape, wrapped):
    batch = [group([[0.1, 0.2], [0.3]], [1.0, 0.0]), group([[0.1]], [1.0])]
    shaper = Given(torch.zeros(shape))
    with pytest.raises(
        InputError, match=r"advantages of shape \(.*\): return one for each of the 3 rollouts or .* 4 tok"
    ):
        give_advantages(batch, SuccessesOnly(shaper) if wrapped else shaper)


@pytest.mark.parametrize(
    ("name", "shaper"),
    [
        ("group", lambda of: of),
        ("difficulty", DifficultyWeighted),
        ("successes", SuccessesOnly),
        ("routed", Routed),
        ("zero-variance", lambda of: ZeroVariance(of, alpha=0.1)),
    ],
)
def test_the_setting_chooses_the_shaper(name, shaper):
    args = ToolExpanderConfig(advantage_shaping=name, scale_rewards="batch", min_reward_std=0.2, hard_sampling="retry")
    assert chosen_advantage_shaper(args) == shaper(GroupRelative("batch", 0.2))
