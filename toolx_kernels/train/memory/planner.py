"""What a run will take of memory, told from configs alone, and what to change where it does not fit.

The model is made on torch's meta device, so weights, gradients and optimizer states are counted to the byte, and
activations are those of a traced pass (see ``activations``). The phases of a step do not peak together: a plan is the
largest of them. The KV pool is there in all, because the engine keeps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from transformers import PreTrainedConfig

from toolx_kernels.engine.engine import MAX_SEQUENCES, PAGE_SIZE
from toolx_kernels.engine.pool_size import pages_of, pages_wanted, pool_pages
from toolx_kernels.engine.runner import MAX_PREFILL_TOKENS
from toolx_kernels.errors import InputError
from toolx_kernels.models.bridge import cache_shape
from toolx_kernels.ops.lm_head import tiles
from toolx_kernels.train.collect import MAX_ROLLOUTS
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.hard_sampling import waves
from toolx_kernels.train.memory.activations import adapt, inference_activations, meta_model, training_activations
from toolx_kernels.train.memory.plan import Bytes, MemoryPlan
from toolx_kernels.train.memory.work import Work
from toolx_kernels.train.update.adamw import CHUNK
from toolx_kernels.train.update.batch import PackedGroup, micro_batches
from toolx_kernels.train.update.offload import STAGING_BYTES

LEAST_MICRO_BATCH = 512  # tokens; below it a step is slow and little is won


def plan_of(
    config: PreTrainedConfig,
    args: ToolExpanderConfig,
    *,
    device: str,
    memory: int,
    work: Work,
) -> MemoryPlan:
    """The plan of a run of ``args`` with a model of ``config``, of which no weight is read.

    Args:
        device: "cuda" or "cpu".
        memory: bytes of that device.
        work: what the rows ask; all prompts of a step are taken to be the longest and, where the method shows
            demonstrations, to have them, and all completions to run to their limit.

    Raises:
        InputError: no causal LM can be made of the config, the adapter's targets are not in it, the optimizer does not
            take its dtype, or the prompts fill its context.
    """
    return Planner(config, device=device, memory=memory, work=work).plan(args)


def flags_of(settings: dict) -> str:
    """Settings as flags of ``toolx train``: ``--dtype bfloat16 --use_peft true``."""
    return " ".join(f"--{name} {str(value).lower() if value is True else value}" for name, value in settings.items())


class Planner:
    """``plan_of`` for several settings; models and traces are kept, as settings that are tried ask for them again."""

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        device: str,
        memory: int,
        work: Work,
    ):
        self.config, self.device, self.memory, self.work = config, device, memory, work
        self.shape = cache(self._shape)
        self.training = cache(self._training)
        self.inference = cache(self._inference)

    def advice(self, args: ToolExpanderConfig) -> tuple[dict, MemoryPlan] | None:
        """The first change of settings with which the run fits, and the plan with it; None: none does.

        In this order: activation checkpointing, then smaller micro-batches too, with the optimizer that is asked for;
        the same with 8-bit states, with states in the CPU's memory (on a GPU), and with an adapter instead of weights.
        """
        optimizers: list[dict] = [{}, {"dtype": "bfloat16", "optim": "adamw_8bit"}]
        if self.device == "cuda":
            optimizers.append({"dtype": "bfloat16", "optim": "adamw_offload"})
        optimizers.append({"dtype": "bfloat16", "optim": "adamw", "use_peft": True})
        budgets = [args.micro_batch_tokens]
        while budgets[-1] > LEAST_MICRO_BATCH:
            budgets.append(max(LEAST_MICRO_BATCH, budgets[-1] // 2))
        passes = [
            {},
            *({"gradient_checkpointing": True, "micro_batch_tokens": budget} for budget in budgets),
        ]
        for optimizer in optimizers:
            if not self.plan(replace(args, **optimizer, **passes[-1])).fits:
                continue
            for change in passes:
                changed = replace(args, **optimizer, **change)
                plan = self.plan(changed)
                if plan.fits:
                    asked = args.to_dict()
                    return {name: value for name, value in changed.to_dict().items() if value != asked[name]}, plan
        return None

    def plan(self, args: ToolExpanderConfig) -> MemoryPlan:
        rank, targets = (args.lora_r, tuple(args.lora_target_modules or ())) if args.use_peft else (0, ())
        key = (args.dtype, rank, targets)
        model = self.shape(*key)
        trained = [p for p in model.parameters() if p.requires_grad]
        weights = sum(p.nbytes for p in model.parameters())
        head = model.get_output_embeddings().weight
        decoder, work = model.get_decoder().config, self.work
        check(args, work, decoder)
        sampled, learned = step_prompts(args, work)
        limit = min(args.max_completion_length, decoder.max_position_embeddings - work.prompt_length)
        groups, n_tokens = micro_batch(learned, limit, args.micro_batch_tokens)
        n_targets = sum(n for _, n in groups) * limit
        on = torch.device(self.device), tiles.Card(self.memory, processors=1)  # which decide no sizes here
        saved, training = self.training(*key, groups, limit, args.gradient_checkpointing)
        asked = {  # tokens of the prompts that are computed together
            "rollout": sum(sampled),
            "probe": work.prompt_length * work.train_rows,
            "evaluation": work.prompt_length * work.eval_rows,
        }
        inference = {
            name: self.inference(*key, min(MAX_PREFILL_TOKENS[self.device], tokens))
            for name, tokens in asked.items()
            if tokens
        }
        loss = loss_bytes(n_targets, *head.shape, head.dtype, *on, trains_head=head.requires_grad)
        pool, kv = self._pool(args, sampled, decoder, head.dtype)

        gradients, states, step = OPTIMIZERS[args.optim](trained, self.device)
        reference = 0
        if args.needs_reference:  # of an adapted model a second adapter is enough
            reference = sum(p.nbytes for p in trained) if args.use_peft else weights
        parts = {
            "weights": Bytes(weights),
            "optimizer states": states,
            "gradients": gradients,
            "reference model": Bytes(reference),
            "KV pool": Bytes(pool),
        }
        always = Bytes(0)
        for name, part in parts.items():
            if name != "gradients":
                always = always.plus(part)
        learning = always.plus(gradients)
        filtered = args.top_k or args.top_p < 1 or args.min_p  # by whole rows of logits, as many as fit the workspace
        sweep = tiles.default_workspace_bytes(*on) if filtered else 0
        sampling = {name: max(computed, sweep) for name, computed in inference.items()}
        # what is alive while the loss is computed: the activations, and beside them the reference's pass or the sweep
        beside = max(loss, inference["rollout"] if args.beta else 0)
        phases = {
            **{name: always.plus(Bytes(computed)) for name, computed in sampling.items()},
            "forward": learning.plus(Bytes(saved + beside)),
            "backward": learning.plus(Bytes(training)),
            "optimizer": learning.plus(Bytes(step)),
        }
        parts |= {"activations": Bytes(saved), "fused loss": Bytes(loss), "rollout step": Bytes(max(sampling.values()))}
        if step:
            parts["optimizer step"] = Bytes(step)
        return MemoryPlan(
            device=self.device,
            memory=self.memory,
            parameters=sum(p.numel() for p in self.shape(args.dtype, 0, ()).parameters()),
            trained_parameters=sum(p.numel() for p in trained),
            micro_batch_tokens=n_tokens,
            parts={name: part for name, part in parts.items() if part != Bytes(0)},
            phases=phases,
            kv=kv,
        )

    def _shape(self, dtype: str, rank: int, targets: tuple[str, ...]):
        model = meta_model(self.config, getattr(torch, dtype))
        if rank:
            adapt(model, rank, list(targets) or None)
        return model

    def _training(self, dtype, rank, targets, groups, limit, checkpointing) -> tuple[int, int]:
        found = training_activations(
            self.shape(dtype, rank, targets),
            [PackedGroup([0] * prompt, [[0] * limit] * n) for prompt, n in groups],
            flex=self.device == "cuda",
            checkpointing=checkpointing,
        )
        return found.saved, found.training

    def _inference(self, dtype, rank, targets, n_tokens) -> int:
        return inference_activations(self.shape(dtype, rank, targets), n_tokens)

    def _pool(
        self, args: ToolExpanderConfig, sampled: Sequence[int], config: PreTrainedConfig, dtype: torch.dtype
    ) -> tuple[int, dict]:
        n_layers, n_kv_heads, head_dim = cache_shape(config)
        token = 2 * n_layers * n_kv_heads * head_dim * dtype.itemsize
        context, work = config.max_position_embeddings, self.work

        def limit(prompt: int) -> int:
            return max(1, min(args.max_completion_length, context - prompt))

        def wanted(lengths: Sequence[int], n: int) -> int:
            limits = [limit(length) for length in lengths]
            return pages_wanted(lengths, n, limits, PAGE_SIZE, MAX_SEQUENCES) if lengths else 0

        in_step = wanted(sampled, args.num_generations)
        at_once = [in_step, wanted([work.prompt_length] * work.eval_rows, 1)]
        for n in waves(args.probe_rollouts):
            at_once.append(wanted([work.prompt_length] * min(work.train_rows, max(1, MAX_ROLLOUTS // n)), n))
        row = pages_of(longest := max(sampled), limit(longest), PAGE_SIZE)
        pages = pool_pages(max(at_once), row, PAGE_SIZE * token, self.memory, self.device)
        cautious = args.needs_reference and args.demonstrations == "better" and args.verification == "cautious"
        kv = {
            "token": token,
            "step_shared": in_step * PAGE_SIZE * token,
            "step_duplicated": len(sampled) * args.num_generations * row * PAGE_SIZE * token,
        }
        return pages * PAGE_SIZE * token * (2 if cautious else 1), kv  # the model before RL samples with its own


def check(args: ToolExpanderConfig, work: Work, config: PreTrainedConfig) -> None:
    """Raises InputError for what a run would be refused for."""
    if args.optim == "adamw_stochastic" and (args.dtype != "bfloat16" or args.use_peft):
        raise InputError(
            "optim='adamw_stochastic' rounds bfloat16 weights, and float32 ones are trained here: use --optim adamw, "
            "or --dtype bfloat16 without an adapter."
        )
    if work.prompt_length >= config.max_position_embeddings:
        raise InputError(
            f"prompt_length={work.prompt_length} fills the model's context of {config.max_position_embeddings} tokens: "
            "shorten the prompts, or take another model."
        )


def step_prompts(args: ToolExpanderConfig, work: Work) -> tuple[list[int], list[tuple[int, int]]]:
    """The prompts of a step whose rows are all hard: tokens of each that is sampled, and (tokens, completions) of each
    group that is learned from."""
    raw, shown, n = work.prompt_length, work.shown_length, args.num_generations
    prompts = {"none": [raw], "replace": [shown], "add": [shown, raw], "distill": [shown, raw]}[args.hard_sampling]
    groups = [(raw, 2 * n)] if args.hard_sampling == "distill" else [(length, n) for length in prompts]
    return prompts * args.prompts_per_step, groups * args.prompts_per_step


def micro_batch(
    learned: Sequence[tuple[int, int]], limit: int, token_budget: int
) -> tuple[tuple[tuple[int, int], ...], int]:
    """The micro-batch with the most tokens of a step: its groups or parts of groups, and its tokens.

    Groups are (tokens of the prompt, completions); completions have ``limit`` tokens.
    """
    groups = [PackedGroup([0] * prompt, [[0] * limit] * n) for prompt, n in learned]
    tokens = {}
    for parts in micro_batches(groups, token_budget):
        shape = tuple((len(group.prompt), len(group.completions)) for group in parts)
        tokens[shape] = sum(group.n_tokens for group in parts)
    return max(tokens.items(), key=lambda of_shape: of_shape[1])


def loss_bytes(
    n_rows: int, vocab_size: int, dim: int, dtype: torch.dtype, device: torch.device, card: tiles.Card, *,
    trains_head: bool,
) -> int:  # fmt: skip
    """The most that the fused loss holds at once, its N rows of hidden states and its results included."""
    space = tiles.workspace_bytes(device, n_rows, vocab_size, card=card)
    elements = n_rows * dim + (vocab_size * dim if trains_head else 0)
    results = elements * dtype.itemsize
    if tiles.single_sweep_plan(n_rows, vocab_size, dim, device, dtype, card=card) is None:
        most = space + n_rows * dim * 4 + results
    else:  # gradients are added up in fp32, and rounded when the workspace has gone; all rows at once take no more
        most = elements * 4 + max(space, results if dtype.itemsize < 4 else 0)
    return most + n_rows * dim * dtype.itemsize


# ---- gradients (held from a backward to the update), states, and what an update takes for a moment


def _adamw(trained: list[torch.Tensor], device: str) -> tuple[Bytes, Bytes, int]:
    """Gradients are added up in fp32, and what is narrower than that has an fp32 master."""
    gradients = sum(4 * p.numel() for p in trained)
    states = sum((8 if p.itemsize == 4 else 12) * p.numel() + 4 for p in trained)
    return Bytes(gradients), Bytes(states), 0


def _adamw_8bit(trained: list[torch.Tensor], device: str) -> tuple[Bytes, Bytes, int]:
    """torchao: per moment a byte an element, an fp32 scale for 256 of them, and a table of 256 fp32 values; parameters
    that are small or odd have moments in the weight's dtype.

    An update makes fp32 copies of a parameter and its moments: on a GPU torch.compile fuses all but the two moments
    (not measured), on a CPU about seven are alive.
    """

    def moments(p: torch.Tensor) -> int:
        if p.numel() < 4096 or p.numel() % 256:
            return 2 * p.nbytes
        return 2 * (p.numel() + p.numel() // 256 * 4 + 256 * 4)

    gradients, states = sum(p.nbytes for p in trained), sum(moments(p) + 4 for p in trained)
    return Bytes(gradients), Bytes(states), (8 if device == "cuda" else 28) * max(p.numel() for p in trained)


def _adamw_stochastic(trained: list[torch.Tensor], device: str) -> tuple[Bytes, Bytes, int]:
    gradients, states = sum(p.nbytes for p in trained), sum(8 * p.numel() + 4 for p in trained)
    chunk = min(CHUNK, max(p.numel() for p in trained))
    return Bytes(gradients), Bytes(states), 4 * 4 * chunk  # weight, gradient, noise and their sum


def _adamw_offload(trained: list[torch.Tensor], device: str) -> tuple[Bytes, Bytes, int]:
    """On the device no more than what is on its way: the input embedding's gradient and those of two other weights."""
    largest = sorted((p.nbytes for p in trained), reverse=True)[:3]
    n_elements = sum(p.numel() for p in trained)
    return Bytes(sum(largest), 4 * n_elements), Bytes(0, 12 * n_elements + 4 * len(trained) + STAGING_BYTES), 0


OPTIMIZERS = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "adamw_stochastic": _adamw_stochastic,
    "adamw_offload": _adamw_offload,
}
