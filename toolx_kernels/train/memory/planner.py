"""The planner: estimates a run's memory from configs alone, and suggests settings that fit.

The model is built on torch's meta device, so weights, gradients and optimizer states are counted to the byte, and
activations come from a traced pass (see ``activations``). The phases of a step do not peak at the same time: a plan is
the largest of them. The KV pool counts in every phase, because the engine keeps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, reduce
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from toolx_kernels.engine.engine import MAX_SEQUENCES, PAGE_SIZE
from toolx_kernels.engine.pool_size import pages_of, pages_wanted, pool_pages
from toolx_kernels.engine.runner import MAX_PREFILL_TOKENS
from toolx_kernels.errors import InputError
from toolx_kernels.models.config import meta_model
from toolx_kernels.models.shape import cache_shape, context_of
from toolx_kernels.ops.lm_head import tiles
from toolx_kernels.train.collect import MAX_ROLLOUTS
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.hard_sampling import waves
from toolx_kernels.train.memory.activations import (
    Activations,
    adapt,
    inference_activations,
    training_activations,
)
from toolx_kernels.train.memory.optimizers import OPTIMIZERS
from toolx_kernels.train.memory.plan import Bytes, MemoryPlan
from toolx_kernels.train.memory.workload import Workload
from toolx_kernels.train.update.batch import PackedGroup, micro_batches, tokens_of

LEAST_MICRO_BATCH = 512  # tokens; smaller ones make a step slow and save little


class ModelShape(NamedTuple):
    """The settings that determine a model's tensors; ``rank`` and ``targets`` are those of its adapter, if any."""

    dtype: str
    rank: int = 0
    targets: tuple[str, ...] = ()


class GroupSize(NamedTuple):
    """Size of a group that a step learns from."""

    prompt: int  # tokens
    completions: int

    def packed(self, limit: int) -> PackedGroup:
        """Returns such a group with completions of ``limit`` tokens."""
        return PackedGroup([0] * self.prompt, [[0] * limit] * self.completions)


def plan_of(
    config: PreTrainedConfig, args: ToolExpanderConfig, *, device: str, memory: int, workload: Workload
) -> MemoryPlan:
    """Plans the memory of a run of ``args`` with a model of ``config``, without reading weights.

    Args:
        device: "cuda" or "cpu".
        memory: bytes of that device.
        workload: of the rows. The plan assumes the worst: every prompt of a step is the longest and, if the method
            shows demonstrations, has them; every completion reaches its limit.

    Raises:
        InputError: the config makes no causal LM, lacks the adapter's targets, has a dtype that the optimizer does not
            take, or a context that the prompts fill; or the model cannot be traced.
    """
    return Planner(config, device=device, memory=memory, workload=workload).plan(args)


def flags_of(settings: dict) -> str:
    """Returns settings as flags of ``toolx train``: ``--dtype bfloat16 --use_peft true``."""
    return " ".join(f"--{name} {str(value).lower() if value is True else value}" for name, value in settings.items())


class Planner:
    """``plan_of`` for several settings; caches models and traces, which settings share."""

    def __init__(self, config: PreTrainedConfig, *, device: str, memory: int, workload: Workload):
        self.config, self.device, self.memory, self.workload = config, device, memory, workload
        self.model = cache(self._model)
        self.training = cache(self._training)
        self.inference = cache(self._inference)

    def advice(self, args: ToolExpanderConfig) -> tuple[dict, MemoryPlan] | None:
        """Returns the first change of settings that makes the run fit, and its plan; None if none does.

        Tries activation checkpointing, then smaller micro-batches as well: first with the given optimizer, then with
        8-bit states, with states in CPU memory (on a GPU), and with an adapter instead of the weights.
        """
        optimizers: list[dict] = [{}, {"dtype": "bfloat16", "optim": "adamw_8bit"}]
        if self.device == "cuda":
            optimizers.append({"dtype": "bfloat16", "optim": "adamw_offload"})
        optimizers.append({"dtype": "bfloat16", "optim": "adamw", "use_peft": True})
        budgets = [args.micro_batch_tokens]
        while budgets[-1] > LEAST_MICRO_BATCH:
            budgets.append(max(LEAST_MICRO_BATCH, budgets[-1] // 2))
        passes: list[dict] = [{}]
        passes += [{"gradient_checkpointing": True, "micro_batch_tokens": budget} for budget in budgets]
        for optimizer in optimizers:
            if not self.plan(replace(args, **optimizer, **passes[-1])).fits:
                continue
            for change in passes:
                changed = replace(args, **optimizer, **change)
                plan = self.plan(changed)
                if plan.fits:
                    given = args.to_dict()
                    return {name: value for name, value in changed.to_dict().items() if value != given[name]}, plan
        return None

    def plan(self, args: ToolExpanderConfig) -> MemoryPlan:
        shape = ModelShape(args.dtype)
        if args.use_peft:
            shape = ModelShape(args.dtype, args.lora_r, tuple(args.lora_target_modules or ()))
        model, workload = self.model(shape), self.workload
        trained = [p for p in model.parameters() if p.requires_grad]
        weights = sum(p.nbytes for p in model.parameters())
        head, decoder = model.get_output_embeddings().weight, model.get_decoder().config
        check(args, workload, decoder)
        sampled, learned = step_prompts(args, workload)
        limit = min(args.max_completion_length, context_of(decoder) - workload.prompt_length)
        groups, n_tokens = micro_batch(learned, limit, args.micro_batch_tokens)
        activations = self.training(shape, groups, limit, args.gradient_checkpointing)
        prefills = {  # tokens of the prompts computed together
            "rollout": sum(sampled),
            "probe": workload.prompt_length * workload.train_rows,
            "evaluation": workload.prompt_length * workload.eval_rows,
        }
        inference = {
            name: self.inference(shape, min(MAX_PREFILL_TOKENS[self.device], tokens))
            for name, tokens in prefills.items()
            if tokens
        }
        on = torch.device(self.device), tiles.Card(self.memory, processors=1)  # processors change no size here
        loss = loss_bytes(sum(group.completions for group in groups) * limit, head, *on)
        filtered = args.top_k or args.top_p < 1 or args.min_p  # in whole rows of logits, as many as fit the workspace
        sweep = tiles.default_workspace_bytes(*on) if filtered else 0
        sampling = {name: max(computed, sweep) for name, computed in inference.items()}
        pool, kv = self._pool(args, sampled, decoder, head.dtype)
        optimizer = OPTIMIZERS[args.optim](trained, self.device)
        reference = 0
        if args.needs_reference:  # for an adapted model a second adapter is enough
            reference = sum(p.nbytes for p in trained) if args.use_peft else weights
        parts = {
            "weights": Bytes(weights),
            "optimizer states": optimizer.states,
            "gradients": optimizer.gradients,
            "reference model": Bytes(reference),
            "KV pool": Bytes(pool),
        }
        learning = reduce(Bytes.plus, parts.values())
        always = reduce(Bytes.plus, (part for name, part in parts.items() if name != "gradients"))
        # while the loss is computed, activations are alive, plus the reference's pass or the sweep
        forward = activations.saved + max(loss, inference["rollout"] if args.beta else 0)
        phases = {
            **{name: always.plus(Bytes(computed)) for name, computed in sampling.items()},
            "forward": learning.plus(Bytes(forward)),
            "backward": learning.plus(Bytes(activations.training)),
            "optimizer": learning.plus(Bytes(optimizer.update)),
        }
        parts |= {
            "activations": Bytes(activations.saved),
            "fused loss": Bytes(loss),
            "rollout step": Bytes(max(sampling.values())),
            "optimizer step": Bytes(optimizer.update),
        }
        return MemoryPlan(
            device=self.device,
            memory=self.memory,
            parameters=sum(p.numel() for p in self.model(ModelShape(args.dtype)).parameters()),
            trained_parameters=sum(p.numel() for p in trained),
            micro_batch_tokens=n_tokens,
            parts={name: part for name, part in parts.items() if part != Bytes(0)},
            phases=phases,
            kv=kv,
        )

    def _model(self, shape: ModelShape) -> PreTrainedModel:
        model = meta_model(self.config, getattr(torch, shape.dtype))
        if shape.rank:
            adapt(model, shape.rank, list(shape.targets) or None)
        return model

    def _training(
        self, shape: ModelShape, groups: tuple[GroupSize, ...], limit: int, checkpointing: bool
    ) -> Activations:
        packed = [group.packed(limit) for group in groups]
        flex = self.device == "cuda"
        return training_activations(self.model(shape), packed, flex=flex, checkpointing=checkpointing)

    def _inference(self, shape: ModelShape, n_tokens: int) -> int:
        return inference_activations(self.model(shape), n_tokens)

    def _pool(
        self, args: ToolExpanderConfig, sampled: Sequence[int], config: PreTrainedConfig, dtype: torch.dtype
    ) -> tuple[int, dict[str, int]]:
        """Returns the bytes of the KV pool, and ``MemoryPlan.kv``."""
        n_layers, n_kv_heads, head_dim = cache_shape(config)
        token = 2 * n_layers * n_kv_heads * head_dim * dtype.itemsize
        context, workload = context_of(config), self.workload

        def limit(prompt: int) -> int:
            return max(1, min(args.max_completion_length, context - prompt))

        def wanted(lengths: Sequence[int], n: int) -> int:
            limits = [limit(length) for length in lengths]
            return pages_wanted(lengths, n, limits, PAGE_SIZE, MAX_SEQUENCES) if lengths else 0

        in_step = wanted(sampled, args.num_generations)
        at_once = [in_step, wanted([workload.prompt_length] * workload.eval_rows, 1)]
        for n in waves(args.probe_rollouts):
            at_once.append(wanted([workload.prompt_length] * min(workload.train_rows, max(1, MAX_ROLLOUTS // n)), n))
        row = pages_of(longest := max(sampled), limit(longest), PAGE_SIZE)
        pages = pool_pages(max(at_once), row, PAGE_SIZE * token, self.memory, self.device)
        cautious = args.needs_reference and args.demonstrations == "better" and args.verification == "cautious"
        kv = {
            "token": token,
            "step_shared": in_step * PAGE_SIZE * token,
            "step_duplicated": len(sampled) * args.num_generations * row * PAGE_SIZE * token,
        }
        return pages * PAGE_SIZE * token * (2 if cautious else 1), kv  # the model before RL has its own pool


def check(args: ToolExpanderConfig, workload: Workload, config: PreTrainedConfig) -> None:
    """Raises InputError if a run with these arguments would be refused."""
    if args.optim == "adamw_stochastic" and (args.dtype != "bfloat16" or args.use_peft):
        raise InputError(
            "optim='adamw_stochastic' trains bfloat16 weights only, and this run trains float32: use --optim adamw, "
            "or --dtype bfloat16 without an adapter."
        )
    context = context_of(config)
    if workload.prompt_length >= context:
        raise InputError(
            f"prompt_length={workload.prompt_length} fills the model's context of {context} tokens: "
            "shorten the prompts, or take another model."
        )


def step_prompts(args: ToolExpanderConfig, workload: Workload) -> tuple[list[int], list[GroupSize]]:
    """Returns the prompts of a step whose rows are all hard: tokens of each sampled prompt, and the groups learned
    from."""
    raw, shown, n = workload.prompt_length, workload.shown_length, args.num_generations
    both, alone = [GroupSize(raw, 2 * n)], [GroupSize(raw, n)]
    # a retry is sampled after the raw prompts, so only the longer prompts of the retry count
    sampled, groups = {
        "none": ([raw], alone),
        "replace": ([shown], [GroupSize(shown, n)]),
        "add": ([shown, raw], [GroupSize(shown, n), *alone]),
        "distill": ([shown, raw], both),
        "retry": ([shown], both if args.retry_learns == "raw" else [GroupSize(shown, n), *alone]),
    }[args.hard_sampling]
    return sampled * args.prompts_per_step, groups * args.prompts_per_step


def micro_batch(learned: Sequence[GroupSize], limit: int, token_budget: int) -> tuple[tuple[GroupSize, ...], int]:
    """Returns the step's largest micro-batch: its groups or parts of groups, and its tokens. Completions have ``limit``
    tokens."""
    packed = {size: size.packed(limit) for size in set(learned)}  # groups of one size share their tokens
    batches = micro_batches([packed[size] for size in learned], token_budget)
    sizes = [tokens_of(batch) for batch in batches]
    most = max(sizes)
    largest = batches[sizes.index(most)]
    return tuple(GroupSize(len(group.prompt), len(group.completions)) for group in largest), most


def loss_bytes(n_rows: int, weight: Tensor, device: torch.device, card: tiles.Card) -> int:
    """Returns the peak bytes of the fused loss with this head, its N rows of hidden states and results included."""
    (vocab_size, dim), dtype = weight.shape, weight.dtype
    space = tiles.workspace_bytes(device, n_rows, vocab_size, card=card)
    elements = n_rows * dim + (weight.numel() if weight.requires_grad else 0)
    results = elements * dtype.itemsize
    if tiles.single_sweep_size(n_rows, vocab_size, dim, device, dtype, card=card) is None:
        most = space + n_rows * dim * 4 + results
    else:  # gradients are accumulated in fp32 and rounded once the workspace is free; all rows at once take no more
        most = elements * 4 + max(space, results if dtype.itemsize < 4 else 0)
    return most + n_rows * dim * dtype.itemsize
