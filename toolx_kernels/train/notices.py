"""Notices: conditions under which a run learns less than it seems to, each told once and again in the summary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from toolx_kernels.evaluate.scores import Scores
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.groups import ScoredGroup
from toolx_kernels.train.policies.advantages import shrunk

MOST = 0.95  # of all completions, which counts as all of them
STREAK = 10  # steps in a row, or all steps of a shorter run, of what a good run may have for a few steps
SLOW = 1e-3  # of learning_rate: nothing is learned any more

TEXTS = {
    "left_out": "{count} of {of} rows were left out, as they do not fit the model's context: shorten their tools, or "
    "take a model with a longer context.",
    "cold_start_left_out": "{count} of {of} training rows are no examples of the cold start, as prompt and answer do "
    "not fit the model's context: shorten their tools, or take a model with a longer context.",
    "partial_probe": "Probing {when} covered {count} of {of} rows, as max_steps={args.max_steps} ends the run within a "
    "round: compare its hard rows with no other probe's, or end after whole rounds, of {detail} steps each.",
    "no_demonstrations": "None of {count} hard rows probed {when} has a demonstration, so "
    "hard_sampling={args.hard_sampling} changes nothing for them: give demonstrations that use their tools.",
    "no_gradient": "No group {when} had a gradient from its rewards, {cause}",
    "truncated": "{count} of {of} completions {when} were cut off {cause}",
    "truncated_evaluation": "{count} of {of} greedy answers {when} were cut off at max_completion_length="
    "{args.max_completion_length}: raise it, or let the model learn to stop first, with cold_start_steps.",
    "unclosed_thoughts": "{count} of {of} completions {when} never closed their thought, so nothing in them counts: "
    "raise max_completion_length={args.max_completion_length}, or switch thoughts off with chat_template_kwargs.",
    "unrewarded": "All {count} completions {when} got None from every reward function, which counts as 0: return "
    "numbers, or leave out rows that no function applies to.",
    "never_applied": "Reward function {detail!r} returned None for all {count} completions {when}: let it return "
    "numbers, or leave it out.",
    "unsolved": "None of {count} completions {when} was solved, as their best reward {most:.3g} is below "
    "solved_reward={args.solved_reward:g}, so all rows count as hard: set solved_reward to the reward of a solution.",
    "floored": "The advantages of {count} of {of} groups {when} are up to {most:.3g} times smaller than rewards of "
    "such a small standard deviation would give, as it counts as min_reward_std={detail}: pass --min_reward_std 0 to "
    "learn as much from them as from others.",
    "decayed": "The learning rate {when} was at most {most:.2g}, less than a thousandth of "
    "learning_rate={args.learning_rate:g}: raise lr_decay={args.lr_decay:g} or min_lr_rate={args.min_lr_rate:g}, or "
    "end the run earlier.",
}
CAUSES = {
    "limit": "at max_completion_length={args.max_completion_length}: raise it, or let the model learn to stop first, "
    "with cold_start_steps.",
    "context": "where the model's context ends: shorten the prompts, or take a model with a longer context.",
    "cut off": "as all completions were cut off: raise max_completion_length={args.max_completion_length}, or let the "
    "model learn to stop first, with cold_start_steps.",
    "none": "as no reward function applied to a completion: return numbers instead of None.",
    "zero": "as all rewards were 0: begin with cold_start_steps or easier rows, or give a reward that also has values "
    "in between.",
    "weights": "although single functions' rewards differed, as their weighted sums are equal in each group: give "
    "other weights than reward_weights={args.reward_weights}.",
    "equal": "as the rewards of each group were equal: take rows of another difficulty, raise "
    "temperature={args.temperature:g}, or give a finer reward.",
    "shaped": "although rewards differed: advantage_shaping={args.advantage_shaping} leaves them no advantage, so "
    "choose another one, or rewards of ordinary size.",
}


@dataclass(slots=True)
class Notice:
    """What is known of a condition.

    looked       how often it was looked for: in each step, probe or evaluation
    times        how often it held; ``streak``: how often in a row, up to now
    first, last  steps at which it held
    count, of    completions or groups that it affected, and all that there were at these steps; rows: the last time
    most         the largest value of its figure
    causes       how often each cause was found
    """

    looked: int = 0
    times: int = 0
    streak: int = 0
    first: int = 0
    last: int = 0
    count: int = 0
    of: int = 0
    most: float | None = None
    causes: dict[str, int] = field(default_factory=dict)
    told: bool = False

    @property
    def when(self) -> str:
        if self.first == self.last:
            return f"at step {self.last}"
        every = self.times == self.last - self.first + 1
        return f"at {'' if every else f'{self.times} of the '}steps {self.first} to {self.last}"


class Notices:
    """The notices of a run. A checkpoint keeps their state, so a resumed run tells none again.

    ``tell(step, name, sentence)`` tells one. A name is a key of ``TEXTS``, with a detail behind a colon where a
    condition has several. The figures in a sentence are of all times so far that the condition held.
    """

    def __init__(
        self, args: ToolExpanderConfig, context: int, own_rewards: bool, tell: Callable[[int, str, str], None]
    ):
        self.args, self.context, self.own_rewards, self._tell = args, context, own_rewards, tell
        self._known: dict[str, Notice] = {}

    def state_dict(self) -> dict:
        return {name: asdict(notice) for name, notice in self._known.items()}

    def load_state_dict(self, state: dict) -> None:
        self._known = {name: Notice(**values) for name, values in state.items()}

    def end(self, step: int) -> list[str]:
        """Tells what held in all steps of a run that is shorter than ``STREAK``; returns the sentences of all that was
        told, for the summary."""
        for name, notice in self._known.items():
            if notice.times == notice.looked and not notice.told:
                self._say(name, step)
        return [self._sentence(name) for name, notice in self._known.items() if notice.told]

    # ---- what is looked at

    def rows(self, left_out: int, rows: int, no_examples: int, training_rows: int) -> None:
        """Looks at the rows that were left out: of all, and of those to imitate in the cold start."""
        self._look("left_out", 0, left_out > 0, left_out, rows)
        self._look("cold_start_left_out", 0, no_examples > 0, no_examples, training_rows)

    def probe(self, step: int, counters: dict[str, Any], whole: int, round_steps: int) -> None:
        """Looks at a probe's counters; ``whole`` is the number of rows that a whole round has."""
        rows, hard = counters["rows"], counters["hard"]
        self._look(f"partial_probe:{round_steps}", step, rows < whole, rows, whole, same=True)
        if self.args.probes and counters["replaced"] is not None:  # None: the last probe, after which no step follows
            self._look("no_demonstrations", step, hard > 0 and not counters["replaced"], hard, rows, same=True)

    def evaluation(self, step: int, scores: Scores) -> None:
        answers = len(scores.rows)
        self._look("truncated_evaluation", step, scores.cut_off >= MOST * answers, scores.cut_off, answers)

    def step(self, record: dict[str, Any], sampled: Sequence[ScoredGroup], learned: Sequence[ScoredGroup]) -> None:
        """Looks at a step: its line of metrics.jsonl, all its groups, and those to learn from."""
        step, rate = record["step"], record["learning_rate"]
        rewards = [reward for group in sampled for reward in group.rewards]
        count = len(rewards)
        room = [self.context - len(group.prompt) for group in sampled for _ in group.rewards]
        reasons = [rollout.finish_reason for group in sampled for rollout in group.rollouts]
        cut = [tokens for tokens, reason in zip(room, reasons, strict=True) if reason == "length"]
        by_context = sum(tokens < self.args.max_completion_length for tokens in cut)
        truncated = len(cut) >= MOST * count
        unclosed = round(record["unclosed_thoughts"] * count)
        of_function = {name: [value for group in sampled for value in group.parts[name]] for name in sampled[0].parts}
        applied = {name: any(value is not None for value in values) for name, values in of_function.items()}
        unrewarded = not any(applied.values())
        equal = all(group.equal_rewards for group in sampled)

        self._look("unclosed_thoughts", step, unclosed >= MOST * count, unclosed, count)
        self._look(
            "truncated",
            step,
            truncated and unclosed < MOST * count,
            len(cut),
            count,
            cause="context" if 2 * by_context > len(cut) else "limit",
        )
        self._look("unrewarded", step, unrewarded, count, count)
        for name, applies in applied.items():
            self._look(f"never_applied:{name}", step, not (applies or unrewarded), count, count, streak=STREAK)
        if self.own_rewards:
            unsolved = not equal and not any(solved for group in sampled for solved in group.solved)
            self._look("unsolved", step, unsolved, count, count, most=max(rewards), streak=STREAK)
        least, factors = max((group.least_std for group in learned), default=0.0), shrunk(learned)
        if factors:
            self._look(f"floored:{least:g}", step, True, len(factors), len(learned), most=max(factors))
        self._look("decayed", step, rate < SLOW * self.args.learning_rate, most=rate)
        if unrewarded:
            cause = "none"
        elif not equal:
            cause = "shaped"
        elif any(len({value or 0.0 for value in part}) > 1 for group in sampled for part in group.parts.values()):
            cause = "weights"
        elif any(rewards) or any(value for values in of_function.values() for value in values):
            cause = "equal"
        else:
            cause = "cut off" if truncated else "zero"
        dead = not any(group.has_gradient for group in learned)
        self._look("no_gradient", step, dead, len(sampled), len(sampled), cause=cause, streak=STREAK)

    # ---- what is told

    def _look(
        self,
        name: str,
        step: int,
        holds: bool,
        count: int = 0,
        of: int = 0,
        *,
        most: float | None = None,
        cause: str = "",
        streak: int = 1,
        same: bool = False,
    ) -> None:
        """Notes whether a condition holds; tells it the first time that it held ``streak`` times in a row. ``same``: it
        is about the same rows each time, so counts are the last ones and not added up."""
        notice = self._known.setdefault(name, Notice())
        notice.looked += 1
        notice.streak = notice.streak + 1 if holds else 0
        if not holds:
            return
        notice.first = notice.first if notice.times else step
        notice.times, notice.last = notice.times + 1, step
        notice.count, notice.of = (count, of) if same else (notice.count + count, notice.of + of)
        if most is not None:
            notice.most = most if notice.most is None else max(most, notice.most)
        if cause:
            notice.causes[cause] = notice.causes.get(cause, 0) + 1
        if notice.streak >= streak and not notice.told:
            self._say(name, step)

    def _say(self, name: str, step: int) -> None:
        self._known[name].told = True
        self._tell(step, name, self._sentence(name))

    def _sentence(self, name: str) -> str:
        kind, _, detail = name.partition(":")
        notice = self._known[name]
        values = asdict(notice) | {"args": self.args, "when": notice.when, "detail": detail}
        if notice.causes:
            values["cause"] = CAUSES[max(notice.causes, key=notice.causes.__getitem__)].format(**values)
        return TEXTS[kind].format(**values)
