"""RolloutEngine: samples n completions for each prompt, directly from the training weights.

Prompts become sequences (``sequences_of``). Then two steps alternate until all have ended: prefill the sequences that
can start (``Scheduler.admit``, ``Runner.prefill``), and decode one token of all running ones (``Scheduler.grow``,
``Runner.decode``). The place of a finished sequence is filled in the next iteration. The pool outlives the call, and
with it the keys and values of prompts, until the weights change.
"""

from __future__ import annotations

import math
import sys
import threading
import warnings
from collections import abc
from functools import partial
from itertools import chain

import numpy as np
import torch
from transformers import PreTrainedModel

from toolx_kernels.engine.fingerprint import Fingerprint, fingerprint
from toolx_kernels.engine.graphs import capture_cuda_graph
from toolx_kernels.engine.pages import PagePool
from toolx_kernels.engine.pool_size import device_memory, pages_of, pages_wanted, pool_pages
from toolx_kernels.engine.runner import Runner
from toolx_kernels.engine.scheduler import Scheduler
from toolx_kernels.engine.sequence import Capacity, Sequence, sequences_of
from toolx_kernels.engine.types import Completion, Group, SamplingParams
from toolx_kernels.errors import InputError, retry_with_less, short
from toolx_kernels.models.bridge import attention_of, evaluating, head_of, toolx_attention
from toolx_kernels.models.shape import cache_shape, context_of
from toolx_kernels.models.support import check_supported
from toolx_kernels.settings import between, check_number

MAX_SEQUENCES = 512  # that decode together
PAGE_SIZE = 16  # tokens
MOST_PAGE_TOKENS, MOST_PAGES = 1 << 16, 1 << 22  # a page costs about 150 bytes besides its tokens


class RolloutEngine:
    """Samples from ``model`` with a paged KV cache that lives as long as the engine.

    Args:
        model: a transformers causal LM of an architecture that docs/models.md lists as exact.
        page_size: tokens per page.
        max_pages: pages in the pool; None lets it grow with the work in powers of two, up to an eighth of a CPU's and
            a quarter of a GPU's memory (more only if a single sequence needs more).
        seed: first word of every sequence's random stream.
        compile: decode through ``torch.compile``. The first step then takes about a minute; worth it on a GPU, where
            a step otherwise launches a thousand small kernels, for runs of more than a few minutes.

    When memory runs out, the engine continues with less and warns once per resource: a pool of half the size, down to
    the needs of the longest sequence; prefill in shorter pieces; fewer sequences at a time. No completion depends on
    these.

    ``preemptions`` counts how often a sequence of the last call was preempted: it gave back its pages and waited.

    Raises:
        InputError: a pool without room for a single token, or a model that cannot be run exactly on our attention
            (see ``check_supported``).
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
        page_size = check_number("page_size", page_size, between(1, MOST_PAGE_TOKENS))
        if max_pages is not None:
            max_pages = check_number("max_pages", max_pages, between(1, MOST_PAGES))
        seed = check_number("seed", seed, between(0, 2**32 - 1))
        if not isinstance(compile, bool):
            raise InputError(f"compile={short(compile)} must be True or False.")
        check_supported(model)
        self._model, self.page_size, self.max_pages, self.seed = model, page_size, max_pages, seed
        self.compile = compile
        self.config = model.get_decoder().config
        needed, there = (max_pages or 1) * self._page_bytes, device_memory(self._device)
        if needed > there:
            raise InputError(
                f"page_size={page_size} with max_pages={max_pages} takes {needed / 2**30:,.1f} GiB, but {self._device} "
                f"has {there / 2**30:,.1f}: lower one of them."
            )
        self.runner: Runner | None = None
        self.preemptions = 0
        self._running = threading.Lock()  # held by a call of generate
        self._weights: Fingerprint | None = None  # of the weights that wrote the pages
        # lowered when memory runs out
        self._most_pages = sys.maxsize
        self._max_sequences = MAX_SEQUENCES
        self._warned: set[str] = set()

    @property
    def model(self) -> PreTrainedModel:
        """The model; another one needs another engine."""
        return self._model

    @property
    def pool(self) -> PagePool | None:
        """The page pool; None before the first call."""
        return self.runner.pool if self.runner else None

    def forget_prefixes(self) -> None:
        """Empties the prefix cache: the next call computes every prompt again, as a new engine would.

        Cached prefixes were computed in another batch, so they may differ in the last bits: call this where a run must
        be exactly repeatable, and after a change that a call does not notice. It notices changes of weights, buffers,
        adapters, hooks and plain attributes of modules, however they were made, but not of the model's config, nor
        functions that were replaced (``fingerprint`` lists both). It looks when it starts, so it does not notice what
        ``on_completion`` changes until the next call.
        """
        if self.pool:
            self.pool.forget_all()

    def release_pool(self) -> bool:
        """Frees the memory of the page pool; the next call makes a new one. Returns whether there was one."""
        had, self.runner = self.runner is not None, None
        return had

    def generate(
        self,
        prompts: abc.Sequence[abc.Sequence[int]],
        n: int,
        params: SamplingParams,
        *,
        row_ids: abc.Sequence[int] | None = None,
        step: int = 0,
        first_rollout: int | abc.Sequence[int] = 0,
        limits: abc.Sequence[int] | None = None,
        on_completion: abc.Callable[[int, int, Completion], bool] | None = None,
    ) -> list[Group]:
        """Samples ``n`` completions of each prompt (lists of token ids); returns groups in the order of ``prompts``.

        The noise of a token is a function of (seed, step, row id, rollout index, position); ``row_ids`` default to
        the prompts' indices, and the n rollouts have the indices from ``first_rollout`` on, which is one number or one
        per prompt. ``limits``, one per prompt, lowers ``params.max_new_tokens`` for prompts that contain earlier
        turns.

        ``on_completion(index of the prompt, rollout index, completion)`` is called with each completion as soon as
        it ends; if it returns True, the unfinished ones of the prompt are cancelled. It may call the model, which is in
        evaluation mode then, or another engine on it, but not this engine. It must not change the weights, which are
        looked at only when a call starts.

        Calls of several engines on one model wait for each other; ``on_completion`` must not wait for such a call in
        another thread.

        It computes in the weights' dtype, even inside autocast. The model is left unchanged.

        Raises:
            InputError: this engine is already running; an argument of the wrong type, n < 1, more than 2**20
                completions in all, an empty prompt, an id outside the vocabulary, a prompt that fills the model's
                context, one whose sequence would not fit the pool, a limit below 1, or a step, row id or rollout index
                outside [0, 2**32); raised before anything runs, naming the prompt.
            DivergedError: a log-prob is not finite.
        """
        if on_completion is not None and not callable(on_completion):
            raise InputError(f"on_completion={short(on_completion)} must be a function, or None.")
        vocab_size = head_of(self.model)["weight"].shape[0]
        groups = sequences_of(
            prompts,
            n,
            params,
            Capacity(vocab_size, context_of(self.config), self.page_size, self.max_pages),
            seed=self.seed,
            step=step,
            row_ids=row_ids,
            first_rollout=first_rollout,
            limits=limits,
        )
        if not groups:
            return []

        if not self._running.acquire(blocking=False):
            raise InputError(
                "This engine is already running, in another thread or around its own on_completion: call generate "
                "after that call has returned."
            )
        try:
            with (
                torch.inference_mode(False),  # the pool outlives this call, so it must not hold inference tensors
                torch.no_grad(),
                torch.cuda.device_of(next(self.model.parameters())),
                torch.autocast(self._device.type, enabled=False),
                toolx_attention(self.model) as own,
                evaluating(self.model),
            ):

                def ended(seq: Sequence) -> bool:
                    if on_completion is None:
                        return False
                    with attention_of(self.model, own):  # it may call the model
                        return on_completion(seq.group, seq.stream[3], seq.completion)

                runner = self._runner_for(groups, params)
                scheduler = Scheduler(runner.pool, list(chain(*groups)), params, self._max_sequences, ended)
                while not scheduler.is_finished:
                    self._prefill(runner, scheduler)
                    self._decode(runner, scheduler)
                self.preemptions = scheduler.preemptions
        except BaseException:
            self.runner = None  # drops whatever was held at that moment (Ctrl-C, out of memory)
            raise
        finally:
            self._running.release()
        return [Group(siblings[0].prompt, [seq.completion for seq in siblings]) for siblings in groups]

    def _prefill(self, runner: Runner, scheduler: Scheduler) -> None:
        """Computes the prompts of the sequences that can start, and samples the first token of each."""
        places, chunk_of, chunks = scheduler.admit()
        if not chunks:
            return

        def first_tokens() -> tuple[np.ndarray, np.ndarray]:  # a retry writes the same to the pages
            return runner.sample(runner.prefill(chunks), chunk_of, scheduler.streams(places))

        def give_back(reason: str) -> bool:
            halved = runner.halve_prefill()
            if halved:
                self._warn("prefill", f"prompts are computed in pieces of at most {runner.prefill_tokens} tokens")
            return halved

        scheduler.record(places, *retry_with_less(first_tokens, give_back))

    def _decode(self, runner: Runner, scheduler: Scheduler) -> None:
        """Samples the next token of every running sequence."""
        scheduler.grow()
        if not len(scheduler.order):
            return

        def next_tokens() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            places, inputs = scheduler.decode_inputs()
            return places, *runner.decode(inputs)

        def give_back(reason: str) -> bool:
            halved = scheduler.halve()
            if halved:
                self._max_sequences = len(scheduler.order)
                self._warn("rows", f"at most {self._max_sequences} completions are sampled at a time")
            return halved

        scheduler.record(*retry_with_less(next_tokens, give_back))

    def _runner_for(self, groups: list[list[Sequence]], params: SamplingParams) -> Runner:
        """A runner ready for a call: the existing one, without cached prefixes if the weights changed, or a new one."""
        weight = next(self.model.parameters())
        weights = fingerprint(self.model)
        if self.runner is not None:
            cache = self.runner.pool.key_caches[0]
            if (cache.dtype, cache.device) != (weight.dtype, weight.device):
                self.runner = None
            elif weights != self._weights:
                self.runner.pool.forget_all()
        self._weights = weights
        pool = self._pool_for(groups, weight)
        if self.runner is None:
            capture = capture_cuda_graph if weight.device.type == "cuda" else None
            self.runner = Runner(self.model, pool, capture, self.compile)
        self.runner.start(params, weights)
        return self.runner

    def _pool_for(self, groups: list[list[Sequence]], weight: torch.Tensor) -> PagePool:
        """The existing pool, enlarged if the work needs it, or a new one; with fewer pages if memory runs out."""
        shape, page_bytes = cache_shape(self.config), self._page_bytes
        prompts, limits = [len(seq.prompt) for seq, *_ in groups], [seq.limit for seq, *_ in groups]
        least = max(map(partial(pages_of, page_size=self.page_size), prompts, limits))
        if self.max_pages is None:
            wanted = pages_wanted(prompts, len(groups[0]), limits, self.page_size, MAX_SEQUENCES)
            wanted = pool_pages(wanted, least, page_bytes, device_memory(weight.device), weight.device.type)
        else:
            wanted = self.max_pages
        n_pages = wanted = max(least, min(wanted, self._most_pages))

        def pool() -> PagePool:
            if self.runner is None:
                return PagePool(n_pages, self.page_size, *shape, like=weight)
            self.runner.pool.enlarge(n_pages)
            return self.runner.pool

        def give_back(reason: str) -> bool:
            nonlocal n_pages
            if self.runner is not None:
                self.runner = None  # frees the old pool, which makes room for a new one
            elif n_pages > least:
                n_pages = max(least, n_pages // 2)
            else:
                raise InputError(
                    f"A pool of {n_pages} pages of {self.page_size} tokens takes {n_pages * page_bytes / 2**30:.2f} "
                    f"GiB, which {weight.device} does not have: lower max_pages, max_new_tokens or the length of the "
                    "prompts."
                )
            return True

        found = retry_with_less(pool, give_back)
        if n_pages < wanted:
            self._most_pages = n_pages
            self._warn("pool", f"the KV pool has {n_pages} pages, not {wanted}, so fewer completions run at a time")
        return found

    def _warn(self, what: str, consequence: str) -> None:
        """Warns that memory ran out, once per resource."""
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f"{self._device} ran out of memory during rollouts: {consequence}.", stacklevel=2)

    @property
    def _page_bytes(self) -> int:
        return 2 * math.prod(cache_shape(self.config)) * next(self.model.parameters()).element_size() * self.page_size

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device
