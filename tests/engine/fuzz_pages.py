"""The page pool against plain lists and dicts: who holds a page, what lies in it, which prefixes are found.

    python -m tests.engine.fuzz_pages --cases 5000 --seed 0

A case is a pool and 200 operations on it, by sequences that share, write and give back pages as the scheduler's do.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import NamedTuple

import torch

from tests.fuzzing import Fuzzer, main
from toolx_kernels.engine.pages import PagePool
from toolx_kernels.errors import InputError

OPERATIONS = 200
HOW_OFTEN = {
    "start": 5, "append": 9, "fork": 3, "end": 5, "drop": 2, "pause": 1, "find": 2, "ask": 0.3, "enlarge": 0.3,
    "forget": 0.1, "drain": 0.1,
}  # fmt: skip
# few different tokens and common beginnings, so that prefixes are often shared
PROMPTS = [[1] * 24, [1] * 8 + [2] * 16, [1] * 10 + [2, 1] * 7, [2] * 5 + [1] * 19, [1, 2, 3] * 8]


class Setting(NamedTuple):
    n_pages: int
    page_size: int


class Holder(NamedTuple):
    tokens: list[int]
    pages: list[int]


class Model:
    """Does operations on a pool and on the obvious data, which must agree.

    holders     sequences, with their tokens and pages
    found       the page of each prefix, as a tuple of tokens, that the pool must find
    remembered  pages that were remembered since they were allocated; not all are found, if others were before them
    released    the time when each page was last released
    counts      what happened
    """

    def __init__(self, setting: Setting):
        size = setting.page_size
        self.pool = PagePool(setting.n_pages, size, 1, 1, 1, like=torch.zeros(1))
        self.size, self.holders, self.paused = size, [], []
        self.found: dict[tuple[int, ...], int] = {}
        self.remembered: set[int] = set()
        self.released: dict[int, int] = {}
        self.now = self.peak = 0
        self.counts: Counter = Counter()
        self.view()

    def view(self) -> None:
        self.cache = self.pool.key_caches[0].view(self.pool.n_pages, self.size).numpy()

    # ---- operations: (first number, second number)

    def start(self, which: int, length: int) -> None:
        self._start(PROMPTS[which % len(PROMPTS)][: 1 + length % 24])

    def _start(self, tokens: list[int]) -> None:
        pages = self.find_pages(tokens[:-1])
        needed = self.pool.pages_for(len(tokens)) - len(pages)
        if needed > len(self.pool.free):
            self.release(pages)
            return
        written = len(pages) * self.size
        pages = pages + self.allocate(needed)
        for place in range(written, len(tokens)):
            self.write(pages, place, tokens[place])
        self.remember(tokens, pages)
        self.holders.append(Holder(list(tokens), pages))

    def append(self, which: int, token: int) -> None:
        if not self.holders:
            return
        tokens, pages = self.holders[which % len(self.holders)]
        page = len(tokens) // self.size
        shared = pages[page:]
        if not shared or self.pool.is_shared(shared[0]):
            if not self.pool.free:
                return
            pages[page:] = self.allocate(1)
            if shared:
                self.pool.copy(shared, pages[page:])
                self.counts["copied"] += 1
                self.release(shared)
        tokens.append(1 + token % 3)
        self.write(pages, len(tokens) - 1, tokens[-1])

    def fork(self, which: int, _: int) -> None:
        if self.holders:
            tokens, pages = self.holders[which % len(self.holders)]
            self.pool.share(pages)
            self.holders.append(Holder(list(tokens), list(pages)))

    def end(self, which: int, kept: int) -> None:
        """As a sequence ends: all tokens but the newest are remembered."""
        if self.holders:
            tokens, pages = self.holders.pop(which % len(self.holders))
            self.remember(tokens[:-1], pages)
            self.release(pages)

    def pause(self, which: int, _: int) -> None:
        """Preempts a sequence, or goes on with one."""
        if self.paused:
            self._start(self.paused.pop())
        elif self.holders:
            self.paused.append(self.holders[which % len(self.holders)].tokens)
            self.end(which, 0)

    def drop(self, which: int, _: int) -> None:
        if self.holders:
            self.release(self.holders.pop(which % len(self.holders)).pages)

    def find(self, which: int, length: int) -> None:
        self.release(self.find_pages(PROMPTS[which % len(PROMPTS)][: length % 25]))

    def ask(self, more: int, _: int) -> None:
        """Asks for more than there is, which changes nothing."""
        count = len(self.pool.free) + 1 + more
        try:
            self.pool.allocate(count)
        except InputError as error:
            assert f"{len(self.pool.free)} free pages of {self.pool.n_pages}, not {count}" in str(error)
        else:
            raise AssertionError("more pages than there are")

    def enlarge(self, more: int, _: int) -> None:
        if self.pool.n_pages < 40:
            self.pool.enlarge(self.pool.n_pages + more % 3 - 1)
            self.view()

    def forget(self, *_: int) -> None:
        self.pool.forget_all()
        self.found.clear()
        self.remembered.clear()

    def drain(self, *_: int) -> None:
        """All sequences end, and every page can be had."""
        while self.holders:
            self.end(0, 0)
        assert self.pool.n_held == 0 and self.pool.references == [0] * self.pool.n_pages
        pages = self.allocate(self.pool.n_pages)
        assert sorted(pages) == list(range(self.pool.n_pages)) and not self.found
        self.release(pages)

    # ---- the pool and the data together

    def allocate(self, count: int) -> list[int]:
        free = set(self.pool.free)
        kept = set(self.found.values()) & free
        pages = self.pool.allocate(count)
        assert len(set(pages)) == count and free.issuperset(pages), "pages that are held, or one twice"
        lost, left = kept.intersection(pages), kept.difference(pages)
        self.counts["lost"] += len(lost)
        if lost:
            assert free - self.remembered <= set(pages), "a prefix is lost, but a page without one was free"
            newest = max(self.released[page] for page in lost)
            assert all(self.released[page] > newest for page in left), "not the prefix that was released first"
        for page in pages:
            self.remembered.discard(page)
        for prefix in [prefix for prefix, page in self.found.items() if page in lost]:
            self.found = {other: page for other, page in self.found.items() if other[: len(prefix)] != prefix}
        self.cache[pages] = -1
        self.peak = max(self.peak, self.pool.n_held)
        return pages

    def release(self, pages: list[int]) -> None:
        self.pool.release(pages)
        for page in reversed(pages):
            self.now += 1
            self.released[page] = self.now

    def remember(self, tokens: list[int], pages: list[int]) -> None:
        self.pool.remember(tokens, pages)
        prefixes = [tuple(tokens[:stop]) for stop in range(self.size, len(tokens) + 1, self.size)]
        known = [n for n in range(len(prefixes)) if pages[n] in self.remembered]
        first = known[-1] + 1 if known else 0
        # what comes after a page whose own prefix is lost cannot be found
        lost = known and self.found.get(prefixes[first - 1]) != pages[first - 1]
        for prefix, page in zip(prefixes[first:], pages[first:], strict=False):
            if lost or prefix not in self.found:
                self.remembered.add(page)
            if not lost:
                self.found.setdefault(prefix, page)

    def find_pages(self, tokens: list[int]) -> list[int]:
        expected: list[int] = []
        while (stop := (len(expected) + 1) * self.size) <= len(tokens) and tuple(tokens[:stop]) in self.found:
            expected.append(self.found[tuple(tokens[:stop])])
        pages = self.pool.find(tokens)
        assert pages == expected, f"found {pages}, remembered {expected}"
        self.check_tokens(tokens[: len(pages) * self.size], pages)
        self.peak = max(self.peak, self.pool.n_held)
        self.counts["found"] += len(pages)
        return pages

    def write(self, pages: list[int], place: int, token: int) -> None:
        page = pages[place // self.size]
        assert self.pool.references[page] == 1 and page not in self.remembered, "others read it"
        self.cache[page, place % self.size] = token

    def check_tokens(self, tokens: list[int], pages: list[int]) -> None:
        assert self.cache[pages].ravel()[: len(tokens)].tolist() == tokens, "a page holds other tokens"

    def check(self) -> None:
        pool, held = self.pool, [0] * self.pool.n_pages
        for holder in self.holders:
            for page in holder.pages:
                held[page] += 1
        assert pool.references == held, "references are not the holders"
        assert sorted(pool.free) == [page for page, count in enumerate(held) if not count], "free pages are held"
        assert pool.n_held + len(pool.free) == pool.n_pages and pool.peak == self.peak


def draw(rng: random.Random) -> tuple[Setting, list[tuple[str, int, int]]]:
    setting = Setting(rng.choice([1, 3, 8, 12, 20]), rng.choice([1, 2, 4, 5]))
    kinds = rng.choices(list(HOW_OFTEN), list(HOW_OFTEN.values()), k=OPERATIONS)
    return setting, [(kind, rng.randrange(256), rng.randrange(256)) for kind in kinds]


def check(setting: Setting, operations: list[tuple[str, int, int]]) -> Counter:
    model = Model(setting)
    for number, (action, first, second) in enumerate(operations):
        getattr(model, action)(first, second)
        model.check()
        if number % 10 == 0:
            for holder in model.holders:
                model.check_tokens(holder.tokens, holder.pages)
    for holder in model.holders:
        model.check_tokens(holder.tokens, holder.pages)
    model.drain()
    return Counter(operations=len(operations)) + model.counts


FUZZER = Fuzzer("page pool", "tests.engine.fuzz_pages", draw, check, lambda operations: 1.0 + 0.02 * len(operations))

if __name__ == "__main__":
    main(FUZZER, __doc__)
