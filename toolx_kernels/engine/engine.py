"""The rollout engine: n completions for each prompt, on the training weights themselves.

One call is a loop of two moves: start what can start (``Scheduler.admit``, ``Runner.prefill``), and take one step with
all that runs (``Scheduler.grow``, ``Runner.decode``). The place of a row that ends is filled at the next turn. The
pool outlives the call, and with it what was computed of prompts, until the weights change.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from toolx_kernels.engine.fingerprint import Fingerprint, fingerprint
from toolx_kernels.engine.graphs import capture_cuda_graph
from toolx_kernels.engine.pages import (
    PagePool,
    pages_of_row,
    pages_wanted,
    physical_memory,
    pool_budget,
    power_of_two,
)
from toolx_kernels.engine.runner import Runner
from toolx_kernels.engine.scheduler import Chunk, Row, Scheduler
from toolx_kernels.engine.types import Completion, Group, SamplingParams
from toolx_kernels.errors import MEMORY_ERRORS, InputError, out_of_memory
from toolx_kernels.models.bridge import cache_shape, check_supported, head_of, toolx_attention

MAX_ROWS = 512  # rows that decode together
PAGE_SIZE = 16  # tokens

T = TypeVar("T")


class RolloutEngine:
    """Samples from ``model`` with a paged KV cache that lives as long as the engine.

    Args:
        model: a transformers causal LM that takes its attention from the registry (Llama, Qwen2, Qwen3, Gemma 3).
        page_size: tokens per page.
        max_pages: pages in the pool; None lets it grow with the work in powers of two, up to an eighth of a CPU's and
            a quarter of a GPU's memory (more only where a single row needs more).
        seed: first word of every row's random stream.
        compile: decode through ``torch.compile``. The first step then takes a minute or so; worth it on a GPU, where
            a step is a thousand small kernels otherwise, for runs of more than a few minutes.

    Where memory runs out, the engine goes on with less and warns once: with a pool of half the size, down to what the
    longest row needs, with prefill in shorter pieces, with fewer rows at a time. No completion depends on these.

    ``preemptions`` counts the rows of the last call that had to give their pages back for a while.

    Raises:
        InputError: a pool without room for a single token, or a model that cannot be run exactly through our
            attention (see ``check_supported``).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        page_size: int = PAGE_SIZE,
        max_pages: int | None = None,
        seed: int = 0,
        compile: bool = False,
    ):
        if page_size < 1:
            raise InputError(f"page_size={page_size} must be at least 1 token.")
        if max_pages is not None and max_pages < 1:
            raise InputError(f"max_pages={max_pages} cannot hold a single row: the shortest needs 1 page.")
        check_supported(model)
        self.model, self.page_size, self.max_pages, self.seed = model, page_size, max_pages, seed
        self.compile = compile
        self.config = model.get_decoder().config
        self.runner: Runner | None = None
        self.preemptions = 0
        self._running = False
        self._weights: Fingerprint | None = None  # of those that wrote the pages
        self._most_pages = max_pages or math.inf  # less where they could not be had
        self._most_rows = MAX_ROWS
        self._said: set[str] = set()

    @property
    def pool(self) -> PagePool | None:
        """The page pool; None before the first call."""
        return self.runner.pool if self.runner else None

    def forget_prefixes(self) -> None:
        """The next call computes every prompt anew, as an engine does that has just been made.

        What is found in the pool was computed in another batch, so it may differ in the last bits: a run that must
        repeat exactly from here on starts from nothing here. A change of the weights or of a module's settings is
        noticed without this; one that shows in neither (in the model's config, say) is not.
        """
        if self.runner:
            self.pool.forget_all()

    def release_pool(self) -> bool:
        """Gives the memory of the page pool back; the next call makes another. Whether there was one."""
        had, self.runner = self.runner is not None, None
        return had

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        *,
        row_ids: Sequence[int] | None = None,
        step: int = 0,
        first_rollout: int | Sequence[int] = 0,
        limits: Sequence[int] | None = None,
        on_completion: Callable[[int, int, Completion], bool] | None = None,
    ) -> list[Group]:
        """``n`` completions of each prompt (lists of token ids), as groups in the order of ``prompts``.

        The noise of a token is a function of (seed, step, row id, rollout index, position); ``row_ids`` default to
        the prompts' places, and the n rollouts have the indices from ``first_rollout`` on, which is one number or one
        for each prompt. ``limits``, one for each prompt, bounds its completions more tightly than
        ``params.max_new_tokens`` does: prompts that hold earlier turns have less left of it.

        ``on_completion(place of the prompt, rollout index, completion)`` is called with each completion as soon as
        it ends; when it returns True, those of the prompt that have not ended are cancelled.

        The computation is in the weights' dtype, whatever autocast surrounds the call. The model is left as it was.

        Raises:
            InputError: n < 1, an empty prompt, an id outside the vocabulary, a prompt that fills the model's
                context, one whose row would not fit the pool, a limit below 1, or a step, row id or rollout index
                outside [0, 2**32); before anything runs, naming the prompt.
        """
        if self._running:
            raise InputError("generate was called from its own on_completion: call it when that call has returned.")
        if n < 1:
            raise InputError(f"n={n} completions per prompt: n must be at least 1.")
        prompts = [_integers(ids) for ids in prompts]
        row_ids = list(range(len(prompts))) if row_ids is None else _integers(row_ids)
        firsts = _integers(first_rollout) if hasattr(first_rollout, "__len__") else [first_rollout] * len(prompts)
        limits = [params.max_new_tokens] * len(prompts) if limits is None else _integers(limits)
        for name, values in (("row_ids", row_ids), ("first_rollout", firsts), ("limits", limits)):
            if len(values) != len(prompts):
                raise InputError(f"{len(values)} {name} for {len(prompts)} prompts: give one for each.")
        context = self.config.max_position_embeddings
        limits = [
            min(limit, params.max_new_tokens, context - len(ids)) for ids, limit in zip(prompts, limits, strict=True)
        ]
        words = {"seed": [self.seed], "step": [step], "row id": row_ids, "first_rollout": firsts}
        self._check(prompts, row_ids, limits, params, words | {"last_rollout": (first + n - 1 for first in firsts)})
        if not prompts:
            return []
        rows = [
            Row(place, ids, limit, (self.seed, step, row_id, first + i))
            for place, (ids, limit, row_id, first) in enumerate(zip(prompts, limits, row_ids, firsts, strict=True))
            for i in range(n)
        ]

        def ended(row: Row) -> bool:
            return on_completion is not None and on_completion(row.group, row.stream[3], row.completion)

        self._running = True
        try:
            with (
                torch.inference_mode(False),  # the pool outlives this call, and inference tensors would not do
                torch.no_grad(),
                torch.cuda.device_of(next(self.model.parameters())),
                torch.autocast(self._device.type, enabled=False),
                _evaluating(self.model),
                toolx_attention(self.model),
            ):
                runner = self._runner_for(prompts, n, limits)
                scheduler = Scheduler(runner.pool, rows, params, min(self._most_rows, MAX_ROWS), ended)
                runner.start(params, self._weights)
                while scheduler.waiting or len(scheduler.order):
                    places, chunk_of, chunks = scheduler.admit()
                    if chunks:
                        start = partial(self._start, runner, scheduler, places, chunk_of, chunks)
                        scheduler.record(places, *_within_memory(start, partial(self._halve_prefill, runner)))
                    scheduler.grow()
                    if len(scheduler.order):
                        step = partial(self._decode, runner, scheduler)
                        scheduler.record(*_within_memory(step, partial(self._halve_rows, scheduler)))
                self.preemptions = scheduler.preemptions
        except BaseException:
            self.runner = None  # whatever was held at that moment (Ctrl-C, out of memory) goes with it
            raise
        finally:
            self._running = False
        completions = iter(row.completion for row in rows)
        return [Group(ids, [next(completions) for _ in range(n)]) for ids in prompts]

    # Both may be done again after half of them: what they write to pages is the same every time.

    @staticmethod
    def _start(runner: Runner, scheduler: Scheduler, places, chunk_of: list[int], chunks: list[Chunk]):
        return runner.sample(runner.prefill(chunks), chunk_of, scheduler.streams(places))

    @staticmethod
    def _decode(runner: Runner, scheduler: Scheduler):
        places, inputs = scheduler.decode_inputs()
        return places, *runner.decode(inputs)

    def _halve_prefill(self, runner: Runner) -> bool:
        halved = runner.halve_prefill()
        if halved:
            self._say("prefill", f"prompts are computed in pieces of {runner.prefill_tokens} tokens or less")
        return halved

    def _halve_rows(self, scheduler: Scheduler) -> bool:
        halved = scheduler.halve()
        if halved:
            self._most_rows = len(scheduler.order)
            self._say("rows", f"{self._most_rows} completions or fewer are sampled at a time")
        return halved

    def _say(self, what: str, consequence: str) -> None:
        if what not in self._said:
            self._said.add(what)
            warnings.warn(f"{self._device} ran out of memory during rollouts: {consequence}.", stacklevel=2)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _check(
        self,
        prompts: list[list[int]],
        row_ids: list[int],
        limits: list[int],
        params: SamplingParams,
        words: dict[str, Iterable[int]],
    ) -> None:
        context, vocab_size = self.config.max_position_embeddings, head_of(self.model)["weight"].shape[0]
        for name, word in ((name, word) for name, given in words.items() for word in given):
            if not (isinstance(word, int) and 0 <= word < 2**32):
                raise InputError(f"{name}={word!r} must be a whole number from 0 to 2**32 - 1, as it names a stream.")
        for token in params.stop_token_ids:
            if not 0 <= token < vocab_size:
                raise InputError(f"stop token {token} is outside the vocabulary of {vocab_size}: it would never come.")
        for place, (ids, row_id, limit) in enumerate(zip(prompts, row_ids, limits, strict=True)):
            name = f"Prompt {place} (row {row_id})"
            if not ids:
                raise InputError(f"{name} is empty: give it at least one token.")
            if not (_whole_numbers(ids) and min(ids) >= 0 and max(ids) < vocab_size):
                bad = [token for token in ids if not (isinstance(token, int) and 0 <= token < vocab_size)]
                raise InputError(f"{name} holds token id {bad[0]!r}, outside the vocabulary of {vocab_size}.")
            if len(ids) >= context:
                raise InputError(f"{name} has {len(ids)} tokens, and the model's context is {context}: shorten it.")
            if limit < 1:
                raise InputError(f"{name} has a limit of {limit} tokens: it must be at least 1.")
            needed = self._pages_of_row(len(ids), limit)
            if self.max_pages is not None and needed > self.max_pages:
                raise InputError(
                    f"{name} with {len(ids)} tokens needs {needed} pages of {self.page_size} tokens, and "
                    f"max_pages is {self.max_pages}: raise it or shorten the prompt."
                )

    def _runner_for(self, prompts: list[list[int]], n: int, limits: list[int]) -> Runner:
        """The kept runner and pool; the pool grows where the work wants it, and forgets where the weights changed."""
        weight = next(self.model.parameters())
        shape = cache_shape(self.config)
        n_pages, least = self._n_pages(prompts, n, limits, 2 * math.prod(shape) * weight.element_size())
        if self.runner is not None:
            cache = self.pool.key_caches[0]
            if (cache.dtype, cache.device) != (weight.dtype, weight.device):
                self.runner = None
        weights = fingerprint(self.model)
        if self.runner is not None:
            if weights != self._weights:
                self.pool.forget_all()
            if n_pages > self.pool.n_pages:
                try:
                    self.pool.enlarge(n_pages)
                except InputError:
                    self.runner = None  # with what the pool held, there is room for another one
        if self.runner is None:
            capture = capture_cuda_graph if weight.device.type == "cuda" else None
            pool = self._new_pool(n_pages, least, shape, weight)
            self.runner = Runner(self.model, pool, capture, self.compile)
        self._weights = weights
        return self.runner

    def _new_pool(self, n_pages: int, least: int, shape: tuple[int, int, int], weight: torch.Tensor) -> PagePool:
        """Of ``n_pages``, or half as many as often as they cannot be had, down to ``least``."""
        wanted = n_pages
        while True:
            try:
                pool = PagePool(n_pages, self.page_size, *shape, like=weight)
                break
            except InputError:
                if n_pages <= least:
                    raise
            n_pages = max(least, n_pages // 2)
        if n_pages < wanted:
            self._most_pages = n_pages
            self._say("pool", f"the KV pool has {n_pages} pages, not {wanted}, so fewer completions run at a time")
        return pool

    def _n_pages(self, prompts: list[list[int]], n: int, limits: list[int], token_bytes: int) -> tuple[int, int]:
        """Pages of the pool, and the least with which every row can run alone."""
        least = max(1, *(self._pages_of_row(len(ids), limit) for ids, limit in zip(prompts, limits, strict=True)))
        if self.max_pages is not None:
            return max(least, min(self.max_pages, self._most_pages)), least
        wanted = pages_wanted([len(ids) for ids in prompts], n, limits, self.page_size, MAX_ROWS)
        if self._device.type == "cuda":
            memory = torch.cuda.get_device_properties(self._device).total_memory
        else:
            memory = physical_memory()
        budget = pool_budget(memory, self._device.type) // (token_bytes * self.page_size)
        # one that grows moves, and the CUDA graphs that read it are lost: it grows seldom
        return max(least, min(power_of_two(wanted), budget, self._most_pages)), least

    def _pages_of_row(self, prompt: int, limit: int) -> int:
        return pages_of_row(prompt, limit, self.page_size)


def _within_memory(work: Callable[[], T], give_back: Callable[[], bool]) -> T:
    """What ``work()`` returns; it is done again as long as it runs out of memory and some could be given back."""
    while True:
        try:
            return work()
        except MEMORY_ERRORS as error:
            if not (out_of_memory(error) and give_back()):
                raise


def _integers(values: Sequence[int]) -> list[int]:
    """As a list of Python numbers, be it a list, an array or a tensor."""
    values = values.tolist() if hasattr(values, "tolist") else list(values)
    return values if _whole_numbers(values) else [v.item() if hasattr(v, "item") else v for v in values]


def _whole_numbers(values: Sequence) -> bool:
    """Without a line of Python for each: a call may bring a hundred thousand."""
    return set(map(type, values)) <= {int}


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Every module in evaluation mode inside the block; each as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
