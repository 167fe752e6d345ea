"""The rollout engine: n completions for each prompt, on the training weights themselves.

A prompt is prefilled once; its siblings share its full pages and copy the partly filled last one. Rows are admitted
in order as long as the pool can hold them to their longest, so no row is ever preempted or dropped, and the place of
a finished row is refilled at the next step. What this engine is not: it compiles nothing and captures no graphs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from toolx_kernels.errors import InputError
from toolx_kernels.ops.hf_attention import PagedContext, check_supported, head_of, run_body, toolx_attention
from toolx_kernels.ops.sampling import sample
from toolx_kernels.rollout.pages import PagePool
from toolx_kernels.rollout.types import Completion, Group, SamplingParams

MAX_ROWS = 256  # rows decoded together; more of them only make the gathered keys larger than the caches
MAX_PREFILL_TOKENS = 4096  # prompt tokens in one forward, which bounds the activations
DEFAULT_POOL_BYTES = 1 << 30


@dataclass(slots=True, eq=False)
class _Prompt:
    ids: list[int]
    row_id: int
    waiting: int  # siblings not admitted yet
    pages: list[int] = field(default_factory=list)
    last_hidden: Tensor | None = None  # (D)


@dataclass(slots=True, eq=False)
class _Row:
    prompt: _Prompt
    rollout: int
    completion: Completion
    limit: int  # tokens this row may get
    pages: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt.ids) + len(self.completion.ids)


class RolloutEngine:
    """Samples from ``model`` with a paged KV cache that lives as long as the engine.

    Args:
        model: a transformers causal LM that takes its attention from the registry (Llama, Qwen2, Qwen3, Gemma 3).
        page_size: tokens per page.
        max_pages: pages in the pool; None sizes it to the work, up to 1 GiB.
        seed: first word of every row's random stream.

    Raises:
        InputError: the model cannot be run exactly through our attention (see ``check_supported``).
    """

    def __init__(self, model: PreTrainedModel, *, page_size: int = 16, max_pages: int | None = None, seed: int = 0):
        if page_size < 1 or (max_pages is not None and max_pages < 1):
            raise InputError(f"page_size={page_size} and max_pages={max_pages} must be at least 1.")
        check_supported(model)
        self.model, self.page_size, self.max_pages, self.seed = model, page_size, max_pages, seed
        self.config = model.get_decoder().config
        self.pool: PagePool | None = None

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        *,
        row_ids: Sequence[int] | None = None,
        step: int = 0,
        first_rollout: int = 0,
    ) -> list[Group]:
        """``n`` completions of each prompt (lists of token ids), as groups in the order of ``prompts``.

        The noise of a token is a function of (seed, step, row id, rollout index, position); ``row_ids`` default to
        the prompts' places, and the n rollouts have the indices from ``first_rollout`` on.

        Raises:
            InputError: n < 1, an empty prompt, an id outside the vocabulary, a prompt that fills the model's
                context, or one whose row would not fit the pool; before anything runs, naming the prompt.
        """
        if n < 1:
            raise InputError(f"n={n} completions per prompt: n must be at least 1.")
        row_ids = range(len(prompts)) if row_ids is None else row_ids
        if len(row_ids) != len(prompts):
            raise InputError(f"{len(row_ids)} row_ids for {len(prompts)} prompts: give one for each.")
        queue = [_Prompt(list(ids), row_id, n) for ids, row_id in zip(prompts, row_ids, strict=True)]
        self._check(queue, params)
        groups = [Group(prompt.ids, [Completion() for _ in range(n)]) for prompt in queue]
        if not groups:
            return groups
        pool = self._pool_for(queue, n, params)
        waiting = deque(zip(queue, groups, strict=True))
        active: list[_Row] = []
        try:
            with _evaluating(self.model), toolx_attention(self.model):
                while waiting or active:
                    new = self._admit(pool, waiting, MAX_ROWS - len(active), n, params)
                    hidden = [self._decode(pool, active)] if active else []
                    if new:
                        hidden.append(torch.stack([row.prompt.last_hidden for row in new]))
                    active += new
                    active = self._extend(pool, active, torch.cat(hidden), params, step, first_rollout)
        except BaseException:
            self.pool = None  # whatever was held at that moment (Ctrl-C, out of memory) goes with it
            raise
        return groups

    def _limit(self, prompt: _Prompt, params: SamplingParams) -> int:
        context = self.config.max_position_embeddings
        return min(params.max_new_tokens, context - len(prompt.ids))

    def _pages_of_row(self, prompt: _Prompt, params: SamplingParams) -> int:
        """Pages of one row at its longest: the last token that is sampled is never written."""
        return -(-(len(prompt.ids) + self._limit(prompt, params) - 1) // self.page_size)

    def _check(self, queue: list[_Prompt], params: SamplingParams) -> None:
        context, vocab_size = self.config.max_position_embeddings, head_of(self.model)["weight"].shape[0]
        for place, prompt in enumerate(queue):
            name = f"Prompt {place} (row {prompt.row_id})"
            if not prompt.ids:
                raise InputError(f"{name} is empty: give it at least one token.")
            if not (0 <= min(prompt.ids) and max(prompt.ids) < vocab_size):
                bad = next(t for t in prompt.ids if not 0 <= t < vocab_size)
                raise InputError(f"{name} holds token id {bad}, outside the vocabulary of {vocab_size}.")
            if len(prompt.ids) >= context:
                raise InputError(
                    f"{name} has {len(prompt.ids)} tokens, and the model's context is {context}: shorten it."
                )
            # a group that still has siblings to admit holds its own partly filled last page besides the row's copy
            needed = self._pages_of_row(prompt, params) + (1 if len(prompt.ids) % self.page_size else 0)
            if self.max_pages is not None and needed > self.max_pages:
                raise InputError(
                    f"{name} with {len(prompt.ids)} tokens needs {needed} pages of {self.page_size} tokens, and "
                    f"max_pages is {self.max_pages}: raise it or shorten the prompt."
                )

    def _pool_for(self, queue: list[_Prompt], n: int, params: SamplingParams) -> PagePool:
        """The kept pool, made anew when it is too small for the largest row or far too small for the work."""
        weight = next(self.model.parameters())
        config = self.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        n_pages = self.max_pages
        if n_pages is None:
            page_bytes = 2 * config.num_hidden_layers * self.page_size * config.num_key_value_heads * head_dim
            affordable = DEFAULT_POOL_BYTES // (page_bytes * weight.element_size())
            per_row = max(self._pages_of_row(prompt, params) for prompt in queue) + 1
            n_pages = max(per_row, min(affordable, per_row * min(MAX_ROWS, len(queue) * n)))
        pool = self.pool
        fits = pool is not None and pool.n_pages >= n_pages
        if not fits or (pool.key_caches[0].dtype, pool.key_caches[0].device) != (weight.dtype, weight.device):
            self.pool = None  # freed before the larger one is made
            self.pool = PagePool(
                n_pages, self.page_size, config.num_hidden_layers, config.num_key_value_heads, head_dim, like=weight
            )
        return self.pool

    def _admit(self, pool: PagePool, waiting: deque, places: int, n: int, params: SamplingParams) -> list[_Row]:
        """Starts the next rows in order, as many as places and pages allow; prefills prompts that are new."""
        rows, fresh, copies = [], [], []
        while waiting and len(rows) < places:
            prompt, group = waiting[0]
            shared = len(prompt.ids) // pool.page_size
            own = self._pages_of_row(prompt, params) - shared
            own_prompt = 0 if prompt.pages else pool.pages_for(len(prompt.ids))
            if own + own_prompt > len(pool.free):
                break
            if own_prompt:
                prompt.pages = pool.allocate(own_prompt)
                fresh.append(prompt)
            pages = pool.allocate(own)
            if shared < len(prompt.pages) and pages:  # the row will write behind the prompt's last token
                copies.append((prompt.pages[shared], pages[0]))
            pool.share(prompt.pages[:shared])
            rollout = n - prompt.waiting
            rows.append(
                _Row(
                    prompt,
                    rollout,
                    group.completions[rollout],
                    self._limit(prompt, params),
                    prompt.pages[:shared] + pages,
                )
            )
            prompt.waiting -= 1
            if prompt.waiting == 0:
                waiting.popleft()
        self._prefill(pool, fresh)
        if copies:
            pool.copy(*map(list, zip(*copies, strict=True)))
        for prompt in {row.prompt for row in rows if row.prompt.waiting == 0}:
            pool.release(prompt.pages)
            prompt.pages = []
        return rows

    def _prefill(self, pool: PagePool, prompts: list[_Prompt]) -> None:
        start = 0
        while start < len(prompts):
            stop, tokens = start, 0
            while stop < len(prompts) and (stop == start or tokens + len(prompts[stop].ids) <= MAX_PREFILL_TOKENS):
                tokens += len(prompts[stop].ids)
                stop += 1
            batch = prompts[start:stop]
            lengths = [len(prompt.ids) for prompt in batch]
            ids = [token for prompt in batch for token in prompt.ids]
            positions = [position for length in lengths for position in range(length)]
            pages = [prompt.pages for prompt in batch]
            hidden = self._forward(pool, ids, positions, pages, lengths, lengths)
            ends = torch.tensor(lengths).cumsum(0) - 1
            for prompt, last in zip(batch, hidden[ends.to(hidden.device)], strict=True):
                prompt.last_hidden = last
            start = stop

    def _decode(self, pool: PagePool, rows: list[_Row]) -> Tensor:
        """Feeds every row its newest token; (R, D)."""
        ids = [row.completion.ids[-1] for row in rows]
        positions = [row.length - 1 for row in rows]
        return self._forward(
            pool, ids, positions, [row.pages for row in rows], [row.length for row in rows], [1] * len(rows)
        )

    def _forward(self, pool, ids, positions, pages, seq_lens, query_lens) -> Tensor:
        device = pool.key_caches[0].device
        width = max(map(len, pages))
        table = torch.tensor([row + [0] * (width - len(row)) for row in pages], dtype=torch.int32)
        positions = torch.tensor(positions)
        query_lens = torch.tensor(query_lens)
        row_of = torch.repeat_interleave(query_lens)
        slots = table[row_of, positions // pool.page_size].long() * pool.page_size + positions % pool.page_size
        cu_seqlens_q = torch.cat((query_lens.new_zeros(1), query_lens.cumsum(0))).int()
        context = PagedContext(
            pool.key_caches,
            pool.value_caches,
            slots.to(device),
            table.to(device),
            torch.tensor(seq_lens, dtype=torch.int32, device=device),
            cu_seqlens_q.to(device),
        )
        return run_body(self.model, torch.tensor(ids, device=device), positions.to(device), context)

    def _extend(self, pool, rows: list[_Row], hidden: Tensor, params: SamplingParams, step: int, first_rollout: int):
        """Samples the next token of every row; returns the rows that go on."""
        streams = [(self.seed, step, row.prompt.row_id, first_rollout + row.rollout, row.length) for row in rows]
        drawn = sample(
            hidden,
            streams=torch.tensor(streams, device=hidden.device),
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            **head_of(self.model),
        )
        tokens, logprobs, entropies, kept = (
            column.tolist() for column in (drawn.tokens, drawn.logprobs, drawn.entropy, drawn.kept_mass)
        )
        going_on = []
        for i, row in enumerate(rows):
            completion = row.completion
            completion.ids.append(tokens[i])
            completion.logprobs.append(logprobs[i])
            completion.entropies.append(entropies[i])
            completion.kept_mass.append(kept[i])
            if tokens[i] in params.stop_token_ids:
                completion.finish_reason = "stop"
            elif len(completion.ids) == row.limit:
                completion.finish_reason = "length"
            else:
                going_on.append(row)
                continue
            pool.release(row.pages)
        return going_on


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Every module in evaluation mode inside the block; each as it was afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
