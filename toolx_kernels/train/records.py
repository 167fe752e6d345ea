"""What the logs say of a step's groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from toolx_kernels.toolcall.rows import Row
from toolx_kernels.train.groups import ScoredGroup


def step_values(groups: Sequence[ScoredGroup], dropped: int) -> dict:
    """Means over all groups that a step sampled, of which the prompt sampler ``dropped`` so many."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    correct = [flag for group in groups for flag in group.correct]
    rewards = [reward for group in groups for reward in group.rewards]
    written = sum(rollout.written for rollout in rollouts)
    return {
        "reward": sum(rewards) / len(rewards),
        "rewards": {name: _mean_part(groups, name) for name in groups[0].parts},
        "accuracy": sum(correct) / len(correct),
        "solved": sum(any(group.correct) for group in groups) / len(groups),
        "replaced": sum(any(group.plan.demonstrations) for group in groups),
        "dropped": dropped,
        "sampler_entropy": sum(sum(rollout.entropies) for rollout in rollouts) / written,
        "completion_length": written / len(rollouts),
        "truncated": sum(rollout.finish_reason == "length" for rollout in rollouts) / len(rollouts),
    }


def _mean_part(groups: Sequence[ScoredGroup], name: str) -> float | None:
    """What one reward function gave on average, where it applied."""
    values = [value for group in groups for value in group.parts[name] if value is not None]
    return sum(values) / len(values) if values else None


def rollout_lines(groups: Sequence[ScoredGroup], rows: Sequence[Row], size: int, count: int) -> Iterator[dict]:
    """At most ``count`` lines of rollouts.jsonl: one rollout of each group, then another one of each, ..."""
    longest = max(len(group.rollouts) for group in groups)
    places = ((place, group) for place in range(longest) for group in groups if place < len(group.rollouts))
    for place, group in islice(places, count):
        yield {
            "row": rows[group.plan.row].id,
            "demonstrations": [demonstration.id for demonstration in group.plan.demonstrations[place // size]],
            "learned_with": [demonstration.id for demonstration in group.plan.scored_with],
            "prompt": rows[group.plan.row].user_text,
            "completion": group.rollouts[place].text,
            "reward": group.rewards[place],
            "advantage": group.advantages[place] if group.advantages else None,
        }
