"""Dynamic multi-round hard sampling (arXiv 2510.07737): what happens to prompts that the model never gets right.

A training row is *hard* when none of ``probe_rollouts`` rollouts of its raw prompt is correct. Before each round its
rows are probed; a hard row gets demonstrations for that round, and is raw again once a probe solves it.

    probe -> HardSamples (the table) -> Demonstrator (which demonstrations) -> policy (what is rolled out with them)
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall.demonstrations import DemonstrationIndex
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.groups import GroupPlan

Demonstrations = tuple[Row, ...]
# Asks for n more rollouts of each (row, demonstrations), from a rollout index on: was any of them correct?
Attempt = Callable[[list[tuple[int, Demonstrations]], int, int], list[bool]]


@dataclass(slots=True)
class Probe:
    """What a probe found.

    tried     per probed row, the rollouts begun when it left: after the first wave with a correct one, or after all
    hard      the rows without any correct rollout, in the order asked
    """

    tried: dict[int, int]
    hard: list[int]
    seconds: float

    @property
    def rollouts(self) -> int:
        return sum(self.tried.values())


def waves(rollouts: int) -> list[int]:
    """Sizes of the waves in which a prompt is probed: it leaves after the first wave that holds a correct rollout.

    >>> waves(10)
    [1, 3, 6]
    """
    sizes = []
    for size in (1, 3):
        if rollouts > 0:
            sizes.append(min(size, rollouts))
            rollouts -= sizes[-1]
    return sizes + [rollouts] if rollouts > 0 else sizes


def probe(asked: Iterable[tuple[int, Demonstrations]], rollouts: int, attempt: Attempt) -> Probe:
    """Rolls out each row's prompt with its demonstrations (none: raw) until one rollout is correct."""
    started = time.perf_counter()
    left = list(asked)
    tried, first = {row: 0 for row, _ in left}, 0
    for size in waves(rollouts):
        if not left:
            break
        solved = attempt(left, size, first)
        first += size
        for row, _ in left:
            tried[row] = first
        left = [one for one, done in zip(left, solved, strict=True) if not done]
    return Probe(tried, [row for row, _ in left], time.perf_counter() - started)


# ---- the table


@dataclass(slots=True)
class RowState:
    """What is known of one training row; a line of ``hard_samples.jsonl``.

    probes          [round, correct (0 or 1: it leaves at the first), rollouts begun] of each probe
    demonstrations  ids of the rows that its prompt shows in the present round; none: it is raw
    cut             demonstrations that were left out of these because the model's context would not hold them
    verified        whether these made a model answer correctly; null when nobody asked
    tries           choices of demonstrations that were tried for the present ones
    retired         rounds whose probe solved the row after one that had not
    relapsed        rounds whose probe failed on the row after one that had solved it
    """

    probes: list[list[int]] = field(default_factory=list)
    demonstrations: list[str] = field(default_factory=list)
    cut: int = 0
    verified: bool | None = None
    tries: int = 0
    retired: list[int] = field(default_factory=list)
    relapsed: list[int] = field(default_factory=list)

    @property
    def hard(self) -> bool:
        return bool(self.probes) and not self.probes[-1][1]


class HardSamples:
    """The state of every training row; part of each checkpoint."""

    def __init__(self, rows: Sequence[Row], demonstrations: Sequence[Row] = ()):
        """``demonstrations`` are more rows whose ids the table may name.

        Raises:
            InputError: one of them has the id of a training row and is another row.
        """
        own = {row.id: row for row in rows}
        for row in demonstrations:
            if own.get(row.id, row) != row:
                raise InputError(f"The demonstrations hold another row with the id {row.id!r}: make ids unique.")
        self.rows = rows
        self.states = [RowState() for _ in rows]
        self.hard = 0  # rows that are hard at present
        self._place = {row.id: place for place, row in enumerate(rows)}
        self._by_id = {row.id: row for row in (*demonstrations, *rows)}

    def record(self, found: Probe, round_index: int) -> None:
        """Enters a probe of raw prompts. Rows that it solved lose their demonstrations."""
        hard = set(found.hard)
        before = sum(self.states[row].hard for row in found.tried)
        for row, rollouts in found.tried.items():
            state = self.states[row]
            if state.probes and state.hard != (row in hard):
                (state.relapsed if row in hard else state.retired).append(round_index)
            state.probes.append([round_index, int(row not in hard), rollouts])
            if row not in hard:
                self.show(row, (), 0, None, 0)
        self.hard += len(hard) - before

    def show(self, row: int, demonstrations: Demonstrations, cut: int, verified: bool | None, tries: int) -> None:
        state = self.states[row]
        state.demonstrations = [demonstration.id for demonstration in demonstrations]
        state.cut, state.verified, state.tries = cut, verified, tries

    def demonstrations(self, row: int) -> Demonstrations:
        return tuple(self._by_id[name] for name in self.states[row].demonstrations)

    def counters(self, round_index: int) -> dict[str, int]:
        """Of the rows that were probed for the round: how many are hard, how many of these are shown with
        demonstrations and how many found none, how many demonstrations the context cut from these, how many rows are
        solved or hard unlike the last time."""
        probed = [state for state in self.states if state.probes and state.probes[-1][0] == round_index]
        hard = [state for state in probed if state.hard]
        shown = sum(bool(state.demonstrations) for state in hard)
        return {
            "rows": len(probed),
            "hard": len(hard),
            "replaced": shown,
            "without_demonstrations": len(hard) - shown,
            "demonstrations_cut": sum(state.cut for state in hard),
            "recovered": sum(round_index in state.retired for state in probed),
            "relapsed": sum(round_index in state.relapsed for state in probed),
        }

    def lines(self) -> list[dict]:
        """The table for people: one object per row that was ever probed."""
        names = tuple(RowState.__dataclass_fields__)
        return [
            {"id": row.id, "hard": state.hard} | {name: getattr(state, name) for name in names}
            for row, state in zip(self.rows, self.states, strict=True)
            if state.probes
        ]

    def load(self, lines: Iterable[dict]) -> None:
        """Takes up the table of a checkpoint, written by ``lines``."""
        for line in lines:
            values = {name: line[name] for name in RowState.__dataclass_fields__}
            self.states[self._place[line["id"]]] = RowState(**values)
        self.hard = sum(state.hard for state in self.states)


# ---- which demonstrations


class Demonstrator(Protocol):
    def choose(self, table: HardSamples, hard: Sequence[int], round_index: int) -> None:
        """Enters demonstrations for the hard rows into the table; those that get none stay raw."""


@dataclass(slots=True)
class RandomDemonstrations:
    """Drawn anew for each round; never verified.

    ``fitting`` cuts the demonstrations of a row down to what the model's context holds.
    """

    index: DemonstrationIndex
    seed: int
    per_tool: int
    limit: int
    fitting: Callable[[Row, Sequence[Row]], Sequence[Row]]

    @classmethod
    def of(
        cls, args: ToolExpanderConfig, index: DemonstrationIndex, fitting: Callable[[Row, Sequence[Row]], Sequence[Row]]
    ) -> RandomDemonstrations:
        return cls(index, args.seed, args.few_shots_per_tool, args.max_few_shots, fitting)

    def choose(self, table: HardSamples, hard: Sequence[int], round_index: int) -> None:
        for row in hard:
            table.show(row, *self.draw(table.rows[row], round_index, 0), None, 1)

    def draw(self, row: Row, round_index: int, attempt: int) -> tuple[Demonstrations, int]:
        """Demonstrations for a row, and how many more there would be if the context held them."""
        rng = random.Random(f"{self.seed} {round_index} {row.id} {attempt}")
        chosen = self.index.choose(row, rng, per_tool=self.per_tool, limit=self.limit)
        shown = tuple(self.fitting(row, chosen))
        return shown, len(chosen) - len(shown)


@dataclass(slots=True)
class VerifiedDemonstrations:
    """ "Better" demonstrations: drawn again until they make a model answer correctly, at most ``tries`` times.

    A row for which none does stays raw. Verified demonstrations are kept as long as the row stays hard. Whose answers
    count is up to ``attempt``: the model before RL (cautious) or the present one (bold).
    """

    random: RandomDemonstrations
    tries: int
    rollouts: int
    attempt: Callable[[int], Attempt]  # of a draw's number, which gives it random streams of its own

    def choose(self, table: HardSamples, hard: Sequence[int], round_index: int) -> None:
        left = [row for row in hard if not table.states[row].demonstrations]
        left = [row for row in left if self.random.index.possible(table.rows[row])]
        for number in range(self.tries):
            drawn = {row: self.random.draw(table.rows[row], round_index, number) for row in left}
            asked = [(row, shown) for row, (shown, _) in drawn.items() if shown]
            failed = set(probe(asked, self.rollouts, self.attempt(number)).hard)
            for row, (shown, cut) in drawn.items():
                verified = bool(shown) and row not in failed
                table.show(row, shown if verified else (), cut, verified, number + 1)
            left = [row for row in left if not table.states[row].verified]


# ---- what is rolled out


class HardSamplePolicy(Protocol):
    """What happens to rows without a correct rollout."""

    def start_round(self, table: HardSamples, hard: Sequence[int], round_index: int) -> None:
        """Prepares the rows that a probe has just found hard."""

    def groups(self, table: HardSamples, row: int) -> list[GroupPlan]:
        """The groups that a step samples for the row."""


class PlainGRPO:
    """Every row stays as it is."""

    def start_round(self, table: HardSamples, hard: Sequence[int], round_index: int) -> None:
        pass

    def groups(self, table: HardSamples, row: int) -> list[GroupPlan]:
        return [GroupPlan(row)]


@dataclass(slots=True)
class FewShot:
    """Hard rows are sampled with demonstrations in their prompt.

    replace  instead of the raw prompt
    add      besides the raw prompt, as a group of its own
    distill  besides the raw prompt, in one group with it, and the loss scores all of it on the raw prompt: the
             demonstrations' help goes into the weights instead of into the use of demonstrations. Beyond the paper.
    """

    form: str
    demonstrator: Demonstrator

    def start_round(self, table: HardSamples, hard: Sequence[int], round_index: int) -> None:
        self.demonstrator.choose(table, hard, round_index)

    def groups(self, table: HardSamples, row: int) -> list[GroupPlan]:
        shown = table.demonstrations(row)
        if not shown:
            return [GroupPlan(row)]
        if self.form == "distill":
            return [GroupPlan(row, ((), shown))]
        replaced = GroupPlan(row, (shown,), shown)
        return [replaced] if self.form == "replace" else [GroupPlan(row), replaced]


def chosen_hard_sample_policy(
    args: ToolExpanderConfig,
    index: DemonstrationIndex,
    fitting: Callable[[Row, Sequence[Row]], Sequence[Row]],
    verification: Callable[[int], Attempt],
) -> HardSamplePolicy:
    if args.hard_sampling == "none":
        return PlainGRPO()
    drawn = RandomDemonstrations.of(args, index, fitting)
    if args.demonstrations == "random":
        return FewShot(args.hard_sampling, drawn)
    verified = VerifiedDemonstrations(drawn, args.demonstration_tries, args.verify_rollouts, verification)
    return FewShot(args.hard_sampling, verified)
