"""Which rows run: admission, pages as rows grow, preemption when they run out, and the end of a row.

A row is one completion on its way. It waits, is admitted (what no page holds of it yet is prefilled), decodes, and is
done. Siblings that are admitted together share all pages of their prompt and copy the partly filled last one when
they first write. A running row has a place in plain arrays, because hundreds of rows take a step together; ``order``
lists the places of the running rows, oldest first. In a step those stand side by side whose prompts lie in the same
pages, whenever they were started.

When a row needs a page and none is free, the youngest row gives its pages back and waits at the head of the queue
with the tokens it has. The oldest row is never the one to go, so something always moves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from toolx_kernels.engine.pages import PagePool
from toolx_kernels.engine.types import Completion, SamplingParams


@dataclass(slots=True, eq=False)
class Row:
    """One completion. ``stream`` is (seed, step, row id, rollout index): the names of its random numbers."""

    group: int  # its prompt's place in the call
    prompt: list[int]
    limit: int  # tokens it may get
    stream: tuple[int, int, int, int]
    completion: Completion = field(default_factory=Completion)
    pages: list[int] = field(default_factory=list)


@dataclass(slots=True, frozen=True)
class Chunk:
    """The tokens of a row from ``start`` on are to be prefilled, e.g. ``Chunk([5, 9, 7], [3], start=2)``."""

    tokens: list[int]
    pages: list[int]
    start: int


@dataclass(slots=True, frozen=True)
class DecodeInputs:
    """What one decode step of R rows in G groups reads."""

    ids: np.ndarray  # (R) int64: the newest token of each row
    positions: np.ndarray  # (R) int64
    slots: np.ndarray  # (R) int64: where its key and value go
    streams: np.ndarray  # (R, 5) int64: of the token to be sampled
    block_table: np.ndarray  # (R, W) int32
    cu_groups: np.ndarray  # (G + 1) int64
    prefix_lens: np.ndarray  # (R) int64


class Batch(NamedTuple):
    """What stays from step to step as long as the same rows run."""

    running: np.ndarray  # places, oldest first
    order: np.ndarray  # of the step
    cu_groups: np.ndarray
    prefix_lens: np.ndarray


STATS = ("logprobs", "lse", "entropies", "kept_mass")  # of a Completion, as the columns of what a step returns


class Scheduler:
    """Moves the rows of one call through a pool.

    ``on_completion`` is called with each row that is done; if it returns True, the rest of its group is cancelled.
    """

    def __init__(
        self,
        pool: PagePool,
        rows: Sequence[Row],
        params: SamplingParams,
        max_rows: int,
        on_completion: Callable[[Row], bool],
    ):
        self.pool, self.waiting, self.on_completion = pool, deque(rows), on_completion
        self.order = np.empty(0, dtype=np.int64)
        self.preemptions = 0
        n = min(max_rows, len(rows))
        longest = max(row.limit for row in rows)
        self._rows: list[Row | None] = [None] * n
        self._vacant = list(range(n))[::-1]
        self._stops = np.array(params.stop_token_ids, dtype=np.int64)
        self._done = self._done_tokens = 0
        self._families: dict[tuple[int, ...], int] = {}  # by the full pages of a prompt
        self._newest, self._length, self._prompt, self._limit, self._family = np.zeros((5, n), dtype=np.int64)
        self._held = np.zeros(n, dtype=np.int64)  # pages
        self._runs = np.zeros(n, dtype=bool)
        self._forked = np.zeros(n, dtype=bool)  # its last page may be shared, and it has yet to write there
        self._stream = np.zeros((n, 5), dtype=np.int64)
        self._table = np.zeros((n, max(map(self._most_pages, rows))), dtype=np.int32)
        self._tokens = np.zeros((n, longest), dtype=np.int64)
        self._stats = np.zeros((n, longest, len(STATS)))
        self._batch = Batch(self.order, self.order, self.order, self.order)

    def _most_pages(self, row: Row) -> int:
        return self.pool.pages_for(len(row.prompt) + row.limit - 1)  # the last token is never written

    # ---- admission

    def admit(self) -> tuple[np.ndarray, list[int], list[Chunk]]:
        """Starts waiting rows in order, as long as there are places, pages, and pages to grow into.

        Returns the places of the rows that start, for each the chunk at whose end its next token is sampled
        (siblings have one in common), and these chunks.
        """
        starting, chunk_of, chunks = [], [], []
        leader = None
        if not (self.waiting and self._vacant):
            return np.empty(0, dtype=np.int64), chunk_of, chunks
        reserved = sum(self._growth(self._rows[place], self._length[place]) for place in self.order)
        while self.waiting and self._vacant:
            row = self.waiting[0]
            length = len(row.prompt) + len(row.completion.ids)
            forked = leader is not None and leader.group == row.group and not row.completion.ids
            tokens = [] if forked else row.prompt + row.completion.ids
            # the last token is computed in any case: the next one is sampled from its hidden state
            found = self.pool.find(tokens[:-1])
            needed = 0 if forked else self.pool.pages_for(length) - len(found)
            copied = int(forked and length % self.pool.page_size > 0)
            growth = self._growth(row, length) + copied
            if needed + growth + reserved > len(self.pool.free) and (starting or len(self.order)):
                self.pool.release(found)
                break
            reserved += growth
            if forked:
                row.pages = list(leader.pages)
                self.pool.share(row.pages)
            else:
                row.pages = found + self.pool.allocate(needed)
                self.pool.remember(tokens, row.pages)
                chunks.append(Chunk(tokens, row.pages, len(found) * self.pool.page_size))
            starting.append(self._enter(self.waiting.popleft()))
            chunk_of.append(len(chunks) - 1)
            leader = None if row.completion.ids else row
        places = np.array(starting, dtype=np.int64)
        self.order = np.concatenate((self.order, places))
        return places, chunk_of, chunks

    def _growth(self, row: Row, length: int) -> int:
        """Pages that a row of ``length`` tokens will still ask for, if it ends when rows of this call end on average.

        Until one has ended, each is thought to run to its limit: no page is promised twice without evidence.
        """
        expected = self._done_tokens / self._done if self._done else row.limit
        last = max(length, min(len(row.prompt) + row.limit, len(row.prompt) + int(expected) + 1) - 1)
        return self.pool.pages_for(last) - self.pool.pages_for(length)

    def _enter(self, row: Row) -> int:
        place, completion = self._vacant.pop(), row.completion
        made = len(completion.ids)
        self._rows[place], self._runs[place] = row, True
        self._prompt[place], self._limit[place] = len(row.prompt), row.limit
        self._length[place] = len(row.prompt) + made
        shared = tuple(row.pages[: len(row.prompt) // self.pool.page_size])
        self._family[place] = self._families.setdefault(shared, len(self._families)) if shared else -1 - place
        self._forked[place] = len(row.prompt) % self.pool.page_size > 0 and not made
        self._stream[place, :4] = row.stream
        self._table[place, : len(row.pages)], self._held[place] = row.pages, len(row.pages)
        self._tokens[place, :made] = completion.ids
        for column, name in enumerate(STATS):
            self._stats[place, :made, column] = getattr(completion, name)
        return place

    # ---- decoding

    def grow(self) -> None:
        """Gives every running row a page of its own for its newest token; may preempt the youngest rows."""
        copies = []
        at = (self._length - 1) // self.pool.page_size
        writing = self.order[((at >= self._held) | self._forked)[self.order]]
        for place, index in zip(writing.tolist(), at[writing].tolist(), strict=True):
            row = self._rows[place]
            while row is not None:  # None: it was preempted for an older one
                shared = row.pages[index:]
                if shared and not self.pool.is_shared(shared[0]):
                    break
                if self.pool.free:
                    row.pages[index:] = self.pool.allocate(1)
                    copies += zip(shared, row.pages[index:], strict=False)
                    self.pool.release(shared)
                    self._table[place, index], self._held[place] = row.pages[index], index + 1
                    break
                self._preempt(self.order[-1])
                row = self._rows[place]
            self._forked[place] = False
        if copies:
            self.pool.copy(*zip(*copies, strict=True))

    def decode_inputs(self) -> tuple[np.ndarray, DecodeInputs]:
        """The places of all running rows in the order of the step, (R), and its inputs."""
        size = self.pool.page_size
        if self._batch.running is not self.order:  # a new array whenever a row comes or goes
            self._batch = self._new_batch()
        order = self._batch.order
        positions = self._length[order] - 1
        self._stream[order, 4] = self._length[order]
        return order, DecodeInputs(
            ids=self._newest[order],
            positions=positions,
            slots=self._table[order, positions // size] * np.int64(size) + positions % size,
            streams=self._stream[order],
            block_table=self._table[order, : positions.max() // size + 1],
            cu_groups=self._batch.cu_groups,
            prefix_lens=self._batch.prefix_lens,
        )

    def _new_batch(self) -> Batch:
        size = self.pool.page_size
        order = self.order[np.argsort(self._family[self.order], kind="stable")]
        bounds = np.concatenate(([0], np.flatnonzero(np.diff(self._family[order])) + 1, [len(order)]))
        siblings = np.diff(bounds)
        shared = np.where(np.repeat(siblings, siblings) > 1, self._prompt[order] // size * size, 0)
        return Batch(self.order, order, bounds, shared)

    def streams(self, places: np.ndarray) -> np.ndarray:
        """(R, 5) of the next tokens of these rows."""
        self._stream[places, 4] = self._length[places]
        return self._stream[places]

    def record(self, places: np.ndarray, tokens: np.ndarray, stats: np.ndarray) -> None:
        """Adds each place's next token, (R), and its statistics, (R, 4); ends the rows that are done."""
        made = self._length[places] - self._prompt[places]
        self._tokens[places, made], self._stats[places, made] = tokens, stats
        self._newest[places] = tokens
        self._length[places] += 1
        stopped = (tokens[:, None] == self._stops).any(1)
        ended = stopped | (made + 1 == self._limit[places])
        if not ended.any():
            return
        done = [self._leave(places[i], "stop" if stopped[i] else "length") for i in np.flatnonzero(ended)]
        self._close_ranks()
        for row in done:
            self._done += 1
            self._done_tokens += len(row.completion.ids)
            if self.on_completion(row):
                self._cancel(row.group)

    # ---- leaving

    def _leave(self, place: int, reason: str) -> Row:
        """The row takes what it has with it, and holds no pages any more; they can be found for a while."""
        row, self._rows[place], self._runs[place] = self._rows[place], None, False
        made = self._length[place] - self._prompt[place]
        row.completion.ids = self._tokens[place, :made].tolist()
        for column, name in enumerate(STATS):
            setattr(row.completion, name, self._stats[place, :made, column].tolist())
        row.completion.finish_reason = reason
        self.pool.remember((row.prompt + row.completion.ids)[:-1], row.pages)  # the newest token is not written
        self.pool.release(row.pages)
        row.pages = []
        self._vacant.append(place)
        return row

    def _preempt(self, place: int) -> None:
        self.waiting.appendleft(self._leave(place, ""))
        self.preemptions += 1
        self._close_ranks()

    def halve(self) -> bool:
        """Puts the younger half of the running rows back into the queue, and no more than the others run from now on.

        False, and nothing happens, if only one row runs.
        """
        n_kept = len(self.order) // 2
        if n_kept == 0:
            return False
        for place in self.order[n_kept:][::-1]:
            self._preempt(place)
        self._vacant.clear()
        return True

    def _cancel(self, group: int) -> None:
        for place in self.order:
            if self._rows[place].group == group:
                self._leave(place, "cancelled")
        self._close_ranks()
        for row in self.waiting:
            if row.group == group:
                row.completion.finish_reason = "cancelled"
        self.waiting = deque(row for row in self.waiting if row.group != group)

    def _close_ranks(self) -> None:
        self.order = self.order[self._runs[self.order]]
