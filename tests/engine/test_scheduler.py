"""Scheduler and pool without a model: the cache holds token ids, so a row's cache can be compared with its tokens."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toolx_kernels.engine.pages import PagePool
from toolx_kernels.engine.scheduler import Scheduler
from toolx_kernels.engine.sequence import Sequence
from toolx_kernels.engine.step_inputs import DecodeInputs, Sizes, bucket, buffer_length, pack, parts_of
from toolx_kernels.engine.types import SamplingParams

STOP = 9


class Simulation:
    """Runs rows to their ends as the engine does; ``draw`` returns the next token."""

    def __init__(self, pool, prompts, n, limit, draw, max_rows=8, cancels=lambda row: False):
        self.pool, self.draw = pool, draw
        self.rows = [Sequence(g, list(p), limit, (0, 0, g, i)) for g, p in enumerate(prompts) for i in range(n)]
        params = SamplingParams(limit, stop_token_ids=(STOP,))
        self.ended = Counter()
        self.cancels = cancels
        self.scheduler = Scheduler(pool, self.rows, params, max_rows, self._on_completion)
        self.prefilled = 0

    def _on_completion(self, row):
        self.ended[id(row)] += 1
        return self.cancels(row)

    @property
    def cache(self):
        return self.pool.key_caches[0].view(self.pool.n_pages, self.pool.page_size)

    def run(self):
        scheduler, turns = self.scheduler, 0
        while not scheduler.is_finished:
            places, chunk_of, chunks = scheduler.admit()
            for chunk in chunks:
                self.prefill(chunk)
            if chunks:
                assert len(places) == len(chunk_of) and max(chunk_of) == len(chunks) - 1
                self.record(places)
            scheduler.grow()
            self.check_pages()
            if len(scheduler.order):
                places, inputs = scheduler.decode_inputs()
                assert len(set(inputs.slots.tolist())) == len(inputs.slots), "two rows write to one slot"
                self.cache.view(-1)[inputs.slots] = torch.tensor(inputs.ids).to(self.cache)
                self.check_rows(places, inputs)
                self.record(places)
            turns += 1
            assert turns < 2000, "it does not end"
        return self

    def prefill(self, chunk):
        for t in range(chunk.start, len(chunk.tokens)):
            self.cache[chunk.pages[t // self.pool.page_size], t % self.pool.page_size] = chunk.tokens[t]
        self.prefilled += len(chunk.tokens) - chunk.start
        assert self.read(chunk.pages, len(chunk.tokens)) == chunk.tokens

    def record(self, places):
        tokens = np.array([self.draw() for _ in places], dtype=np.int64)
        self.scheduler.record(places, tokens, np.stack([tokens / 2.0] * 4, axis=1))

    def read(self, pages, length):
        return self.cache[torch.tensor(pages, dtype=torch.long)].flatten()[:length].long().tolist()

    def check_rows(self, places, inputs):
        scheduler = self.scheduler
        assert sorted(places) == sorted(scheduler.order)
        for i, place in enumerate(places):
            row, length = scheduler._sequences[place], int(inputs.positions[i]) + 1
            made = scheduler._tokens[place, : length - len(row.prompt)].tolist()
            assert self.read(inputs.block_table[i], length) == row.prompt + made
            assert inputs.streams[i].tolist() == [*row.stream, length]
        for g, (start, stop) in enumerate(zip(inputs.cu_groups[:-1], inputs.cu_groups[1:], strict=True)):
            shared = inputs.prefix_lens[start:stop]
            assert len(set(shared.tolist())) == 1 and shared[0] % self.pool.page_size == 0
            n_pages = shared[0] // self.pool.page_size
            assert (inputs.block_table[start:stop, :n_pages] == inputs.block_table[start, :n_pages]).all(), g
            assert shared[0] <= inputs.positions[start:stop].min()
        assert inputs.cu_groups[0] == 0 and inputs.cu_groups[-1] == len(inputs.ids)

    def check_pages(self):
        holders = Counter(page for row in self.scheduler._sequences.values() for page in row.pages)
        assert self.pool.references == [holders[page] for page in range(self.pool.n_pages)]
        assert sorted(self.pool.free) == [page for page in range(self.pool.n_pages) if not holders[page]]


def make_pool(n_pages, page_size=4):
    return PagePool(n_pages, page_size, 1, 1, 1, like=torch.zeros(1))


def pages_of(prompt, limit, page_size=4):
    return -(-(len(prompt) + limit - 1) // page_size)


def test_the_youngest_rows_are_preempted_and_nothing_is_lost():
    """Early stops make rows look short; then rows grow, and the pool is too small for all that were started."""
    lengths = iter([1] * 6)  # the first six rows end with their first token

    def draw():
        return STOP if next(lengths, None) else 5

    simulation = Simulation(make_pool(12), [[1, 2, 3]] * 20, 1, 16, draw, max_rows=16).run()
    assert simulation.scheduler.preemptions > 0
    assert [len(row.completion.ids) for row in simulation.rows] == [1] * 6 + [16] * 14
    assert simulation.pool.peak <= 12


def test_nothing_is_preempted_when_rows_run_to_their_limit():
    simulation = Simulation(make_pool(12), [[1, 2, 3]] * 20, 1, 16, lambda: 5, max_rows=16).run()
    assert simulation.scheduler.preemptions == 0


@pytest.mark.parametrize("length, copies", [(8, 0), (9, 2), (11, 2)])
def test_siblings_share_all_but_the_partly_filled_page(length, copies):
    pool = make_pool(40)
    copied = []
    pool.copy = lambda sources, destinations: (copied.extend(destinations), PagePool.copy(pool, sources, destinations))
    simulation = Simulation(pool, [list(range(1, 9)) + [1] * (length - 8)], 3, 2, lambda: 5).run()
    assert len(copied) == copies, "the last of three siblings keeps the page"
    assert simulation.prefilled == length
    assert pool.peak == 2 + 3


def test_a_prompt_is_computed_once_across_groups_and_calls():
    pool = make_pool(40)
    first = Simulation(pool, [[1] * 8 + [2, 3], [1] * 8 + [4, 5, 6]], 2, 2, lambda: 5).run()
    assert first.prefilled == 10 + 3
    again = Simulation(pool, [[1] * 8 + [4, 5, 6], [1] * 8], 1, 2, lambda: 5).run()
    assert again.prefilled == 3 + 4, "of a prompt that lies there whole, the last page is computed for its last token"
    pool.forget_all()
    assert Simulation(pool, [[1] * 8], 1, 2, lambda: 5).run().prefilled == 8


def test_a_row_that_was_preempted_goes_on_from_its_tokens():
    pool = make_pool(4)
    rows = [Sequence(0, [1, 2, 3], 6, (0, 0, 0, 0)), Sequence(1, [3, 2, 1], 6, (0, 0, 1, 0))]
    scheduler = Scheduler(pool, rows, SamplingParams(6), 2, lambda row: False)
    scheduler._done, scheduler._done_tokens = 1, 1  # as if rows were short
    places, _, _ = scheduler.admit()
    assert len(places) == 2
    for token in range(4, 7):
        scheduler.record(scheduler.order, np.array([token] * 2), np.zeros((2, 4)))
        scheduler.grow()
    scheduler._preempt(scheduler.order[-1])
    assert [row.completion.ids for row in scheduler.waiting] == [[4, 5, 6]] and scheduler.preemptions == 1
    _, _, [chunk] = scheduler.admit()
    assert chunk.tokens == [3, 2, 1, 4, 5, 6] and chunk.start == 4, "its first page still lay there"


def test_a_prompt_is_read_once_for_siblings_that_start_later():
    pool = make_pool(60)
    rows = [Sequence(g, [g] * 9, 4, (0, 0, g, i)) for i in range(2) for g in (1, 2)]  # siblings are not adjacent
    scheduler = Scheduler(pool, rows, SamplingParams(4), 4, lambda row: False)
    places, _, chunks = scheduler.admit()
    assert [chunk.start for chunk in chunks] == [0, 0, 8, 8]
    scheduler.record(places, np.array([5] * 4), np.zeros((4, 4)))
    scheduler.grow()
    places, inputs = scheduler.decode_inputs()
    assert [scheduler._sequences[place].group for place in places] == [1, 1, 2, 2]
    assert inputs.cu_groups.tolist() == [0, 2, 4] and inputs.prefix_lens.tolist() == [8] * 4


def test_a_batch_that_runs_dry_meets_few_buckets():
    assert len({bucket(Sizes(rows, 1, 1, 1)).rows for rows in range(1, 513)}) == 14
    assert len({bucket(Sizes(320, 32, 80, siblings)).siblings for siblings in range(1, 100)}) == 3


@given(st.integers(1, 600), st.integers(1, 600), st.integers(1, 300), st.integers(1, 100))
def test_buckets_hold_what_they_are_for(rows, groups, width, siblings):
    exact = Sizes(rows, min(rows, groups), width, siblings)
    sizes = bucket(exact)
    assert all(have >= need for have, need in zip(sizes[:3], exact[:3], strict=True))
    assert sizes.siblings >= min(siblings, 64)
    assert sizes.rows < 2 * rows and sizes.rows < rows + 64
    assert sizes.groups > exact.groups or sizes.rows == rows
    assert bucket(sizes._replace(groups=1)).rows == sizes.rows


@pytest.mark.parametrize("rows, filling", [(1, 0), (1, 1), (3, 1)])
def test_a_step_reads_its_inputs_in_place(rows, filling):
    """Also for a single row, whose strides torch does not normalize: a kernel would be compiled for other strides."""
    numbers = np.arange(1, 100)
    inputs = DecodeInputs(
        ids=numbers[:rows],
        positions=numbers[5 : 5 + rows],
        slots=numbers[10 : 10 + rows],
        streams=numbers[: 5 * rows].reshape(rows, 5),
        block_table=numbers[: 2 * rows].reshape(rows, 2),
        cu_groups=np.array([0, rows]),
        prefix_lens=numbers[20 : 20 + rows],
    )
    sizes = Sizes(rows + filling, 1 + filling, 4, 4)
    flat = np.full(buffer_length(sizes), 7)
    pack(inputs, parts_of(flat, sizes))
    step = parts_of(torch.from_numpy(flat), sizes)
    assert all(part.stride() == torch.empty(part.shape).stride() for part in step)
    for name in ("ids", "positions", "slots", "streams", "prefix_lens"):
        assert np.array_equal(getattr(step, name)[:rows], getattr(inputs, name))
    assert np.array_equal(step.block_table[:rows, :2], inputs.block_table)
    assert step.seq_lens.tolist() == [*(inputs.positions + 1)] + [1] * filling
    assert step.slots[rows:].tolist() == [-1] * filling
    assert step.cu_groups.tolist() == [0, rows] + [rows + 1] * filling
    assert step.cu_rows.tolist() == list(range(rows + filling + 1))
