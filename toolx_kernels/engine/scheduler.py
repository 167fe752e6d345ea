"""The scheduler: admission, pages, preemption and the end of sequences.

A sequence waits, is admitted (tokens that are not in the cache are prefilled), decodes, and is done. Siblings that are
admitted together share all pages of their prompt and copy the partly filled last one when they first write. A running
sequence has a place in plain arrays, because hundreds take a step together; ``order`` lists the places of the running
sequences, oldest first. In a step, sequences whose prompts are in the same pages are neighbors, whenever they were
admitted.

When a sequence needs a page and none is free, the youngest is preempted: it gives back its pages and waits at the head
of the queue with the tokens it has. The oldest is never preempted, so there is always progress.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from toolx_kernels.engine.pages import PagePool
from toolx_kernels.engine.pool_size import pages_of
from toolx_kernels.engine.sequence import Sequence
from toolx_kernels.engine.step_inputs import DecodeInputs
from toolx_kernels.engine.types import SamplingParams
from toolx_kernels.errors import DivergedError


@dataclass(slots=True, frozen=True)
class Chunk:
    """A sequence whose tokens from ``start`` on are to be prefilled, e.g. ``Chunk([5, 9, 7], [3], start=2)``."""

    tokens: list[int]
    pages: list[int]
    start: int


class Started(NamedTuple):
    """The sequences that start together."""

    places: np.ndarray
    # of each sequence: the chunk at whose end its next token is sampled; siblings share one
    chunk_of: list[int]
    chunks: list[Chunk]


class Batch(NamedTuple):
    """The arrays of a step that stay the same as long as the same sequences run."""

    running: np.ndarray  # places, oldest first
    order: np.ndarray  # of the step
    cu_groups: np.ndarray
    prefix_lens: np.ndarray


STATS = ("logprobs", "lse", "entropies", "kept_mass")  # fields of a Completion, in the order of a step's statistics
FINITE = [0, 2]  # of these: log-probs and entropies


class Scheduler:
    """Moves the sequences of one call through a pool.

    ``on_completion`` is called with each sequence that is done; if it returns True, the rest of its group is cancelled.
    """

    def __init__(
        self,
        pool: PagePool,
        sequences: list[Sequence],
        params: SamplingParams,
        max_sequences: int,
        on_completion: Callable[[Sequence], bool],
    ):
        self.pool, self.waiting, self.on_completion = pool, deque(sequences), on_completion
        self.order = np.empty(0, dtype=np.int64)
        self.preemptions = 0
        n = min(max_sequences, len(sequences))
        longest = max(seq.limit for seq in sequences)
        most_pages = max(pages_of(len(seq.prompt), seq.limit, pool.page_size) for seq in sequences)
        self._sequences: dict[int, Sequence] = {}  # by place
        self._vacant = list(range(n))[::-1]
        self._stops = np.array(params.stop_token_ids, dtype=np.int64)
        self._done = self._done_tokens = 0
        self._families: dict[tuple[int, ...], int] = {}  # by the full pages of a prompt
        self._newest, self._length, self._prompt, self._limit, self._family = np.zeros((5, n), dtype=np.int64)
        self._held = np.zeros(n, dtype=np.int64)  # pages
        self._runs = np.zeros(n, dtype=bool)
        self._forked = np.zeros(n, dtype=bool)  # its last page may be shared, and it has not written there yet
        self._stream = np.zeros((n, 5), dtype=np.int64)
        self._table = np.zeros((n, most_pages), dtype=np.int32)
        self._tokens = np.zeros((n, longest), dtype=np.int64)
        self._stats = np.zeros((n, longest, len(STATS)))
        self._batch = Batch(self.order, self.order, self.order, self.order)

    # ---- admission

    @property
    def is_finished(self) -> bool:
        return not (self.waiting or len(self.order))

    def admit(self) -> Started:
        """Starts waiting sequences in order, as long as there are places, pages, and pages for growth."""
        starting: list[int] = []
        chunk_of: list[int] = []
        chunks: list[Chunk] = []
        leader: Sequence | None = None
        if not (self.waiting and self._vacant):
            return Started(np.empty(0, dtype=np.int64), chunk_of, chunks)
        reserved = sum(self._growth(self._sequences[place], self._length[place]) for place in self.order.tolist())
        while self.waiting and self._vacant:
            seq = self.waiting[0]
            length = len(seq.prompt) + len(seq.completion.ids)
            forked = leader if leader and leader.group == seq.group and not seq.completion.ids else None
            tokens = [] if forked else seq.prompt + seq.completion.ids
            # the last token is always computed, because the next one is sampled from its hidden state
            found = self.pool.find(tokens[:-1])
            needed = 0 if forked else self.pool.pages_for(length) - len(found)
            copied = int(forked is not None and length % self.pool.page_size > 0)
            growth = self._growth(seq, length) + copied
            if needed + growth + reserved > len(self.pool.free) and (starting or len(self.order)):
                self.pool.release(found)
                break
            reserved += growth
            if forked:
                seq.pages = list(forked.pages)
                self.pool.share(seq.pages)
            else:
                seq.pages = found + self.pool.allocate(needed)
                self.pool.remember(tokens, seq.pages)
                chunks.append(Chunk(tokens, seq.pages, len(found) * self.pool.page_size))
            starting.append(self._enter(self.waiting.popleft()))
            chunk_of.append(len(chunks) - 1)
            leader = None if seq.completion.ids else seq
        places = np.array(starting, dtype=np.int64)
        self.order = np.concatenate((self.order, places))
        return Started(places, chunk_of, chunks)

    def _growth(self, seq: Sequence, length: int) -> int:
        """Pages that a sequence of ``length`` tokens will still need, if it ends at the average length of the others.

        Until one has ended, each is assumed to run to its limit, so that no page is promised twice without evidence.
        """
        expected = self._done_tokens / self._done if self._done else seq.limit
        last = max(length, min(len(seq.prompt) + seq.limit, len(seq.prompt) + int(expected) + 1) - 1)
        return self.pool.pages_for(last) - self.pool.pages_for(length)

    def _enter(self, seq: Sequence) -> int:
        place, completion = self._vacant.pop(), seq.completion
        made = len(completion.ids)
        self._sequences[place], self._runs[place] = seq, True
        self._prompt[place], self._limit[place] = len(seq.prompt), seq.limit
        self._length[place] = len(seq.prompt) + made
        shared = tuple(seq.pages[: len(seq.prompt) // self.pool.page_size])
        self._family[place] = self._families.setdefault(shared, len(self._families)) if shared else -1 - place
        self._forked[place] = len(seq.prompt) % self.pool.page_size > 0 and not made
        self._stream[place, :4] = seq.stream
        self._table[place, : len(seq.pages)], self._held[place] = seq.pages, len(seq.pages)
        self._tokens[place, :made] = completion.ids
        for column, name in enumerate(STATS):
            self._stats[place, :made, column] = getattr(completion, name)
        return place

    # ---- decoding

    def grow(self) -> None:
        """Gives every running sequence an unshared page for its newest token; may preempt the youngest sequences."""
        copies: list[tuple[int, int]] = []
        at = (self._length - 1) // self.pool.page_size
        writing = self.order[((at >= self._held) | self._forked)[self.order]]
        for place, index in zip(writing.tolist(), at[writing].tolist(), strict=True):
            seq = self._sequences.get(place)
            while seq is not None:  # None: preempted for an older one
                shared = seq.pages[index:]
                if shared and not self.pool.is_shared(shared[0]):
                    break
                if self.pool.free:
                    seq.pages[index:] = self.pool.allocate(1)
                    copies += zip(shared, seq.pages[index:], strict=False)
                    self.pool.release(shared)
                    self._table[place, index], self._held[place] = seq.pages[index], index + 1
                    break
                self._preempt(int(self.order[-1]))
                seq = self._sequences.get(place)
            self._forked[place] = False
        if copies:
            self.pool.copy(*zip(*copies, strict=True))

    def decode_inputs(self) -> tuple[np.ndarray, DecodeInputs]:
        """The places of all running sequences in the order of the step, (R), and the inputs of the step."""
        size = self.pool.page_size
        if self._batch.running is not self.order:  # a new array whenever a sequence comes or goes
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
        """The random streams of the next tokens of these sequences, (R, 5)."""
        self._stream[places, 4] = self._length[places]
        return self._stream[places]

    def record(self, places: np.ndarray, tokens: np.ndarray, stats: np.ndarray) -> None:
        """Adds each place's next token, (R), and its statistics, (R, 4); ends the sequences that are done."""
        if not np.isfinite(stats[:, FINITE]).all():
            place = int(places[np.flatnonzero(~np.isfinite(stats[:, FINITE]).all(1))[0]])
            seq = self._sequences[place]
            raise DivergedError(
                f"the model's log-probs are not finite on prompt {seq.group} (row {seq.stream[2]}), completion "
                f"{seq.stream[3]}"
            )
        made = self._length[places] - self._prompt[places]
        self._tokens[places, made], self._stats[places, made] = tokens, stats
        self._newest[places] = tokens
        self._length[places] += 1
        stopped = (tokens[:, None] == self._stops).any(1)
        ended = stopped | (made + 1 == self._limit[places])
        if not ended.any():
            return
        done = [self._leave(int(places[i]), "stop" if stopped[i] else "length") for i in np.flatnonzero(ended)]
        self._close_ranks()
        for seq in done:
            self._done += 1
            self._done_tokens += len(seq.completion.ids)
            if self.on_completion(seq):
                self._cancel(seq.group)

    # ---- leaving

    def _leave(self, place: int, reason: str) -> Sequence:
        """Vacates a place: moves the tokens to the completion and releases the pages, which can still be found."""
        seq, self._runs[place] = self._sequences.pop(place), False
        made = self._length[place] - self._prompt[place]
        seq.completion.ids = self._tokens[place, :made].tolist()
        for column, name in enumerate(STATS):
            setattr(seq.completion, name, self._stats[place, :made, column].tolist())
        seq.completion.finish_reason = reason
        self.pool.remember((seq.prompt + seq.completion.ids)[:-1], seq.pages)  # the newest token is not written
        self.pool.release(seq.pages)
        seq.pages = []
        self._vacant.append(place)
        return seq

    def _preempt(self, place: int) -> None:
        self.waiting.appendleft(self._leave(place, ""))
        self.preemptions += 1
        self._close_ranks()

    def halve(self) -> bool:
        """Puts the younger half of the running sequences back into the queue and halves the places from now on.

        Returns False, and does nothing, if only one sequence runs.
        """
        n_kept = len(self.order) // 2
        if n_kept == 0:
            return False
        for place in self.order[n_kept:][::-1].tolist():
            self._preempt(place)
        self._vacant.clear()
        return True

    def _cancel(self, group: int) -> None:
        for place in self.order.tolist():
            if self._sequences[place].group == group:
                self._leave(place, "cancelled")
        self._close_ranks()
        for seq in self.waiting:
            if seq.group == group:
                seq.completion.finish_reason = "cancelled"
        self.waiting = deque(seq for seq in self.waiting if seq.group != group)

    def _close_ranks(self) -> None:
        self.order = self.order[self._runs[self.order]]
