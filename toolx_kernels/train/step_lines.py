"""Lines of a step: its groups as values for metrics.jsonl, and their rollouts for rollouts.jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from toolx_kernels.rollout.rollout import Rollout
from toolx_kernels.toolcall.parse import split_thought
from toolx_kernels.toolcall.rewards import completion_turns
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.train.groups import RAW, ScoredGroup


def step_values(groups: Sequence[ScoredGroup], dropped: int) -> dict:
    """Returns metrics of all groups that a step sampled, ``dropped`` of them by the prompt order: rewards, right calls
    and solved groups over first draws only, lengths and the rest over all rollouts."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    first = [group.part(places) for group in groups if (places := group.first_places)]
    correct = [flag for group in first for flag in group.correct]
    rewards = [reward for group in first for reward in group.rewards]
    written = sum(rollout.written for rollout in rollouts)
    thoughts = [_thought(rollout) for rollout in rollouts]
    return {
        "reward": sum(rewards) / len(rewards),
        "rewards": {name: _mean_part(first, name) for name in first[0].parts},
        "accuracy": sum(correct) / len(correct),
        "solved": sum(not group.dead for group in first) / len(first),
        "replaced": sum(any(help != RAW for help in group.plan.shown) for group in first),
        "retried": sum(group.tries > 0 for group in first),
        "revived": sum(group.revived for group in first),
        "dropped": dropped,
        "sampler_entropy": sum(sum(rollout.entropies) for rollout in rollouts) / written,
        "completion_length": written / len(rollouts),
        "truncated": sum(rollout.finish_reason == "length" for rollout in rollouts) / len(rollouts),
        "thoughts": sum(begun for begun, _ in thoughts) / len(thoughts),
        "unclosed_thoughts": sum(unclosed for _, unclosed in thoughts) / len(thoughts),
    }


def _thought(rollout: Rollout) -> tuple[bool, bool]:
    """Returns whether a turn begins with a thought, and whether a thought is never closed."""
    turns = [split_thought(text) for text in completion_turns(rollout.messages)]
    return any(thought is not None for thought, _ in turns), any(rest is None for _, rest in turns)


def _mean_part(groups: Sequence[ScoredGroup], name: str) -> float | None:
    """Returns the mean of one reward function where it applied."""
    values = [value for group in groups for value in group.parts[name] if value is not None]
    return sum(values) / len(values) if values else None


def _mean(advantage: float | list[float]) -> float:
    return sum(advantage) / len(advantage) if isinstance(advantage, list) else advantage


def rollout_lines(
    groups: Sequence[ScoredGroup], learned: Sequence[ScoredGroup], rows: Sequence[Row], count: int
) -> Iterator[dict]:
    """Yields at most ``count`` lines of rollouts.jsonl: one rollout of each group, then a second one of each, ...; only
    rollouts in ``learned`` groups have an advantage."""
    advantages = {
        id(rollout): _mean(advantage)
        for group in learned
        for rollout, advantage in zip(group.rollouts, group.advantages, strict=True)
    }
    longest = max(len(group.rollouts) for group in groups)
    places = ((place, group) for place in range(longest) for group in groups if place < len(group.rollouts))
    for place, group in islice(places, count):
        yield {
            "row": rows[group.plan.row].id,
            "demonstrations": [demonstration.id for demonstration in group.shown[place].demonstrations],
            "hint": group.shown[place].hint,
            "retried": group.retried[place],
            "learned_with": [demonstration.id for demonstration in group.plan.scored_with.demonstrations],
            "prompt": rows[group.plan.row].user_text,
            "completion": group.rollouts[place].text,
            "reward": group.rewards[place],
            "advantage": advantages.get(id(group.rollouts[place])),
        }
