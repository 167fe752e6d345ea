"""Schedules of random calls on small pools: each sequence ends, with the tokens that it would have alone.

    python -m tests.engine.fuzz_scheduler --cases 5000 --seed 0

A case is two calls on one pool, with preemption, cancelled groups and memory that runs out in a step.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import NamedTuple

import numpy as np

from tests.engine.test_scheduler import STOP, Simulation, make_pool, pages_of
from tests.fuzzing import Fuzzer, main


class Setting(NamedTuple):
    page_size: int
    spare: int  # pages more than the longest sequence needs
    n: int
    limit: int
    max_sequences: int
    stops: int  # one token in so many ends a sequence
    cancels: int  # one sequence in so many cancels its group when it ends
    halves: int  # memory runs out in one step in so many
    forgets: bool  # between the calls


class Calls(Simulation):
    """A call whose next token is a function of the prompt, the rollout and the position."""

    def __init__(self, pool, prompts, setting, call):
        self.setting, self.rng = setting, random.Random(call)
        super().__init__(pool, prompts, setting.n, setting.limit, None, setting.max_sequences, self.cancel)
        self.cancelled = set()

    def cancel(self, row):
        if self.rng.randrange(self.setting.cancels):
            return False
        self.cancelled.add(row.group)
        return True

    def token(self, row, place):
        number = hash((tuple(row.prompt), row.stream[3], place)) // 7
        return STOP if number % self.setting.stops == 0 else 1 + number % 3

    def alone(self, row):
        tokens = []
        while len(tokens) < row.limit and STOP not in tokens:
            tokens.append(self.token(row, len(tokens)))
        return tokens

    def record(self, places):
        scheduler = self.scheduler
        made = (scheduler._length - scheduler._prompt)[places]
        rows = [scheduler._sequences[place] for place in places]
        tokens = np.array([self.token(*one) for one in zip(rows, made.tolist(), strict=True)], dtype=np.int64)
        scheduler.record(places, tokens, np.stack([tokens / 2.0] * 4, axis=1))

    def check_pages(self):
        """Before a step, which may run out of memory, as in the engine."""
        super().check_pages()
        if not self.rng.randrange(self.setting.halves):
            before = len(self.scheduler.order)
            assert self.scheduler.halve() == (before > 1) and len(self.scheduler.order) == max(before // 2, before % 2)
            super().check_pages()

    def check_end(self):
        assert self.pool.references == [0] * self.pool.n_pages and len(self.pool.free) == self.pool.n_pages
        for row in self.rows:
            done, expected = row.completion, self.alone(row)
            assert done.logprobs == done.lse == done.entropies == done.kept_mass == [token / 2 for token in done.ids]
            if done.finish_reason == "cancelled":
                assert row.group in self.cancelled and self.ended[id(row)] == 0
                assert done.ids == expected[: len(done.ids)] and len(done.ids) < len(expected)
            else:
                assert done.ids == expected, f"{done.ids}, alone {expected}"
                assert done.finish_reason == ("stop" if expected[-1] == STOP else "length")
                assert self.ended[id(row)] == 1


def draw(rng: random.Random) -> tuple[Setting, list[list[int]]]:
    setting = Setting(
        page_size=rng.choice([1, 3, 4]),
        spare=rng.randrange(13),
        n=rng.randint(1, 5),
        limit=rng.randint(1, 12),
        max_sequences=rng.randint(1, 8),
        stops=rng.choice([5, 10, 10**9]),
        cancels=rng.choice([8, 10**9]),
        halves=rng.choice([7, 10**9]),
        forgets=rng.random() < 0.3,
    )
    # few different tokens, so that prompts often share a prefix
    return setting, [[rng.randint(1, 2) for _ in range(rng.randint(1, 14))] for _ in range(rng.randint(1, 5))]


def check(setting: Setting, prompts: list[list[int]]) -> Counter:
    if not prompts:
        return Counter()
    longest = max(pages_of(prompt, setting.limit, setting.page_size) for prompt in prompts)
    pool = make_pool(longest + setting.spare, setting.page_size)
    counts: Counter = Counter()
    for call in range(2):  # the second finds prefixes of the first
        done = Calls(pool, prompts, setting, call).run()
        done.check_end()
        if setting.forgets:
            pool.forget_all()
        counts.update(
            sequences=len(done.rows),
            preempted=done.scheduler.preemptions,
            cancelled=sum(row.completion.finish_reason == "cancelled" for row in done.rows),
        )
    return counts


FUZZER = Fuzzer("schedules", "tests.engine.fuzz_scheduler", draw, check, lambda prompts: 10.0)

if __name__ == "__main__":
    main(FUZZER, __doc__)
