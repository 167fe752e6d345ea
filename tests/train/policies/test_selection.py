"""Selection of the rollouts of a group that are learned from."""

import itertools
import random
import statistics

import pytest

from toolx_kernels.rollout.rollout import Rollout
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.groups import RAW, GroupPlan, ScoredGroup
from toolx_kernels.train.policies.selection import AllRollouts, MaxVariance, chosen_group_selector


def scored(rewards):
    rollouts = [Rollout([n], [-1.0], [0.5], None, str(n), [], "stop") for n in range(len(rewards))]
    solved = [reward >= 1 for reward in rewards]
    flags = {"shown": [RAW] * len(rewards), "retried": [n % 2 == 1 for n in range(len(rewards))]}
    earned = dict(rewards=list(rewards), parts={"f": list(rewards)}, correct=list(solved), solved=solved)
    return ScoredGroup(GroupPlan(0), [3], rollouts, **flags, **earned)


@pytest.mark.parametrize(
    ("rewards", "share", "kept"),
    [
        ([0.0, 0.0, 1.0, 0.0], 0.5, [2, 3]),  # the two highest vary as much as the lowest and the highest
        ([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0], 0.5, [1, 4, 6, 7]),
        ([0.0, 0.0, 0.0, 0.0, 0.0, 1.0], 0.5, [3, 4, 5]),  # 3 are kept
        ([1.0, 0.0, 1.0, 0.0, 1.0, 0.0], 0.5, [1, 2, 4]),  # 0 1 1 and 0 0 1 vary equally: fewer of the lowest win
        ([0.5, 0.2, 0.9, 0.4, 0.6], 0.5, [1, 2]),
        ([0.5, 0.5, 0.5, 0.5, 0.5], 0.7, [0, 1, 2]),
        ([0.1] * 7, 0.5, [0, 1, 2]),
        ([0.0, 1.0, 0.0], 0.1, [1, 2]),  # at least two
        ([0.0, 1.0], 0.5, [0, 1]),
        ([0.3, 0.1, 0.2], 1.0, [0, 1, 2]),
    ],
)
def test_the_kept_rollouts_by_hand(rewards, share, kept):
    group = scored(rewards)
    (part,) = MaxVariance(share)([group])
    assert [rollout.text for rollout in part.rollouts] == [str(place) for place in kept]
    assert part.rewards == part.parts["f"] == [rewards[place] for place in kept]
    assert part.solved == [rewards[place] >= 1 for place in kept]
    assert part.retried == [place % 2 == 1 for place in kept]
    assert len(group.rollouts) == len(rewards) and group.rewards == rewards, "the group itself stays whole"


def test_no_other_subset_varies_more():
    chance = random.Random(0)
    for _ in range(60):
        rewards = [chance.choice([0.0, 0.25, 1.0, chance.random(), -1.5]) for _ in range(chance.randint(2, 8))]
        share = chance.choice([0.3, 0.5, 0.75])
        kept = MaxVariance(share).places(rewards, max(2, int(share * len(rewards))))
        assert len(kept) == max(2, int(share * len(rewards))) and kept == sorted(set(kept))
        most = max(statistics.pvariance(some) for some in itertools.combinations(rewards, len(kept)))
        assert statistics.pvariance([rewards[place] for place in kept]) == pytest.approx(most, rel=1e-12)


def test_the_setting_chooses_the_selector():
    groups = [scored([0.0, 1.0]), scored([1.0, 1.0])]
    selector = chosen_group_selector(ToolExpanderConfig())
    assert isinstance(selector, AllRollouts) and all(a is b for a, b in zip(selector(groups), groups, strict=True))
    assert chosen_group_selector(ToolExpanderConfig(rollout_selection="max-variance")) == MaxVariance(share=0.5)


def test_a_retried_group_keeps_half_of_what_it_was_drawn_with_and_divides_the_loss_by_that():
    group = scored([0.0] * 4)
    group.extend(scored([1.0, 0.0, 1.0, 0.0]))
    (part,) = MaxVariance()([group])
    assert sorted(part.rewards) == [0.0, 1.0] and len(part.lengths) == 2
    assert [len(each.lengths) for each in MaxVariance()([scored([0.0, 1.0, 0.0, 1.0])])] == [2]
