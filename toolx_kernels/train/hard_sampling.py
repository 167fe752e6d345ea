"""Hard sampling in rounds (arXiv 2510.07737): probes, and the table of rows that the model never solves.

A training row is *hard* when none of ``probe_rollouts`` rollouts of its raw prompt is solved (``Task.solved``). Each
round begins with a probe of its rows; a hard row gets demonstrations for that round, and is raw again once a probe
solves it.

    probe -> HardSamples (the table) -> Demonstrator (chooses demonstrations) -> policy (samples with them)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.train.groups import RAW, ScoredGroup

Demonstrations = tuple[Row, ...]
# Samples n more rollouts of each (row, demonstrations), from a rollout index on; returns whether any was solved
Attempt = Callable[[list[tuple[int, Demonstrations]], int, int], list[bool]]


@dataclass(slots=True)
class Probe:
    """Result of a probe.

    tried     rollouts started per probed row: up to the first wave with a solved one, or all
    hard      the rows without any solved rollout, in the order given
    """

    tried: dict[int, int]
    hard: list[int]
    seconds: float

    @property
    def rollouts(self) -> int:
        return sum(self.tried.values())


def waves(rollouts: int) -> list[int]:
    """Returns the sizes of the waves in which a prompt is probed; it leaves after the first wave with a solved rollout.

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
    """Rolls out each row's prompt with its demonstrations (none: raw) until one rollout is solved."""
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
    """State of one training row; a line of ``hard_samples.jsonl``.

    probes          [round, solved (0 or 1: the first solved one ends it), rollouts started] of each probe
    draws           [rollouts, solved ones] of its raw prompt in steps, without retries
    demonstrations  ids of the rows that its prompt shows in the current round; empty: it is raw
    cut             demonstrations left out because the model's context cannot hold them
    verified        whether these made a model answer correctly; null if not verified
    tries           draws of demonstrations up to the current ones
    retired         rounds whose probe solved the row after a probe that had not
    relapsed        rounds whose probe failed on the row after a probe that had solved it
    only_shown      rounds in which all rollouts with demonstrations were solved, so nothing was learned
    """

    probes: list[list[int]] = field(default_factory=list)
    draws: list[int] = field(default_factory=lambda: [0, 0])
    demonstrations: list[str] = field(default_factory=list)
    cut: int = 0
    verified: bool | None = None
    tries: int = 0
    retired: list[int] = field(default_factory=list)
    relapsed: list[int] = field(default_factory=list)
    only_shown: list[int] = field(default_factory=list)

    @property
    def hard(self) -> bool:
        return bool(self.probes) and not self.probes[-1][1]


class HardSamples:
    """The state of every training row; part of each checkpoint."""

    def __init__(self, rows: Sequence[Row], demonstrations: Sequence[Row] = ()):
        """``demonstrations`` are additional rows whose ids the table may contain.

        Raises:
            InputError: one of them has the id of a training row but differs from it.
        """
        own = {row.id: row for row in rows}
        for row in demonstrations:
            if own.get(row.id, row) != row:
                raise InputError(f"The demonstrations hold another row with the id {row.id!r}: make ids unique.")
        self.rows = rows
        self.states = [RowState() for _ in rows]
        self.hard = 0  # number of rows that are hard now
        self._place = {row.id: place for place, row in enumerate(rows)}
        self._by_id = {row.id: row for row in (*demonstrations, *rows)}

    def record(self, found: Probe, round_index: int) -> None:
        """Records a probe of raw prompts. Solved rows lose their demonstrations."""
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

    def draw(self, groups: Iterable[ScoredGroup], round_index: int) -> None:
        """Records the groups that a step sampled, before retries.

        A group that is scored with demonstrations and all solved has no gradient, and would have none next time: from
        now on the row's prompt shows one demonstration fewer, down to none.
        """
        for group in groups:
            state, help = self.states[group.plan.row], group.plan.scored_with
            raw = [solved for solved, shown in zip(group.solved, group.shown, strict=True) if shown == RAW]
            state.draws = [state.draws[0] + len(raw), state.draws[1] + sum(raw)]
            if help.demonstrations and all(group.solved):
                state.demonstrations, state.verified = state.demonstrations[:-1], None
                if round_index not in state.only_shown:
                    state.only_shown.append(round_index)

    def show(self, row: int, demonstrations: Demonstrations, cut: int, verified: bool | None, tries: int) -> None:
        state = self.states[row]
        state.demonstrations = [demonstration.id for demonstration in demonstrations]
        state.cut, state.verified, state.tries = cut, verified, tries

    def demonstrations(self, row: int) -> Demonstrations:
        return tuple(self._by_id[name] for name in self.states[row].demonstrations)

    def counters(self, round_index: int) -> dict[str, int]:
        """Counts the rows probed for the round: all, the hard ones, hard ones with and without demonstrations,
        demonstrations that the context cut, rows newly solved, rows newly hard again, and hard rows whose rollouts with
        demonstrations were all solved since the last probe."""
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
            "only_shown": sum(_only_shown_since_last_probe(state) for state in hard),
        }

    def lines(self) -> list[dict]:
        """Human-readable table: one object per row that was ever probed or sampled."""
        names = tuple(RowState.__dataclass_fields__)
        return [
            {"id": row.id, "hard": state.hard} | {name: getattr(state, name) for name in names}
            for row, state in zip(self.rows, self.states, strict=True)
            if state != RowState()
        ]

    def load(self, lines: Iterable[dict]) -> None:
        """Loads the table of a checkpoint, written by ``lines``."""
        for line in lines:
            values = {name: line[name] for name in RowState.__dataclass_fields__}
            self.states[self._place[line["id"]]] = RowState(**values)
        self.hard = sum(state.hard for state in self.states)


def _only_shown_since_last_probe(state: RowState) -> bool:
    before = state.probes[-2][0] if len(state.probes) > 1 else 0
    return bool(state.only_shown) and state.only_shown[-1] >= before
