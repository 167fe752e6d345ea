"""Providers of whole optimizer steps: ours, and TRL's GRPOTrainer with its two ways of sampling without vLLM.

Both keep the weights in the case's dtype, keep all activations unless their name says otherwise, and use small
micro-batches: TRL two completions, the most that fits 24 GB at 500 tokens; ours one group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from transformers import (
    ContinuousBatchingConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)

from bench.step.cases import Case, Settings
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.hard_sampling import HardSamples
from toolx_kernels.train.trainer import ToolExpanderTrainer

TRL_ROWS = 2  # completions in one forward and backward pass
NO_TOKEN = -1  # the end of turn if completions must not end


class StepProvider:
    """A trainer of ``model`` on ``rows``, ``case.prompts`` of them in each step, in their order."""

    name: str
    package: str | None = None  # what to install

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        case: Case,
        settings: Settings,
        rows: Sequence[Row],
        reward: Callable,
        folder: Path,
    ):
        """Imports and builds what the trainer needs; it may write into ``folder``. Raises Absent or ImportError."""
        raise NotImplementedError

    def run(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        """``case.steps`` updates, with ``begin`` called before and ``end`` after each."""
        raise NotImplementedError

    def updates(self) -> list[dict[str, float]]:
        """``learning_rate`` and ``grad_norm``, before clipping, of every update."""
        raise NotImplementedError

    def own_peak(self) -> int:
        """Peak bytes that it recorded since the last call, if it resets the system's record of the peak."""
        return 0


class InOrder:
    """A PromptOrder that takes the rows as they come."""

    max_batches = 1

    def __init__(self, size: int):
        self.size = size

    def rows(self, batch: int, table: HardSamples) -> list[int]:
        return list(range(batch * self.size, (batch + 1) * self.size))

    def candidates(self, batches: Iterable[int]) -> list[int]:
        return [row for batch in batches for row in range(batch * self.size, (batch + 1) * self.size)]

    def keeps(self, group) -> bool:
        return True


class Toolx(StepProvider):
    name = "toolx"
    options: Mapping[str, object] = {}  # of ToolExpanderConfig, besides the settings of all trainers

    def __init__(self, model, tokenizer, case, settings, rows, reward, folder):
        args = ToolExpanderConfig(
            output_dir=str(folder),
            dtype=case.dtype,
            num_generations=case.n,
            prompts_per_step=case.prompts,
            max_completion_length=case.new,
            max_steps=case.steps,
            lr_decay=1.0,
            hard_sampling="none",
            micro_batch_tokens=case.group_tokens,
            log_completions=0,
            **asdict(settings),
            **self.options,
        )
        self.args = args
        self.trainer = ToolExpanderTrainer(
            model, reward, args, rows, rows[:1], tokenizer, prompt_order=InOrder(case.prompts)
        )
        self.trainer.run.start(args)
        if not case.stop:
            self.trainer.collector.params = args.sampling()
        self.steps, self.records = case.steps, []

    def run(self, begin, end):
        for _ in range(self.steps):
            begin()
            record = self.trainer.step()
            end()
            self.records.append(record)

    def updates(self):
        return [{name: record[name] for name in ("learning_rate", "grad_norm")} for record in self.records]

    def own_peak(self):
        peaks = self.trainer.reporter.phases.peaks
        highest = max(peaks.values(), default=0)
        peaks.clear()
        return highest


class ToolxCheckpointing(Toolx):
    name = "toolx, gradient checkpointing"
    options = {"gradient_checkpointing": True}


class TRL(StepProvider):
    """GRPOTrainer with TRL's defaults, sampling with ``generate``, without logs and checkpoints."""

    name = "TRL"
    package = "trl"
    gradient_checkpointing = False
    continuous_batching = False

    def __init__(self, model, tokenizer, case, settings, rows, reward, folder):
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        args = GRPOConfig(
            output_dir=str(folder),
            use_cpu=model.device.type == "cpu",
            seed=0,
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            save_strategy="no",
            shuffle_dataset=False,
            # the weights are in the case's dtype already: no autocast, no copy in another
            bf16=False,
            num_generations=case.n,
            max_completion_length=case.new,
            max_steps=case.steps,
            per_device_train_batch_size=TRL_ROWS,
            gradient_accumulation_steps=case.rows // TRL_ROWS,
            lr_scheduler_type="constant",
            gradient_checkpointing=self.gradient_checkpointing,
            use_transformers_continuous_batching=self.continuous_batching,
            transformers_continuous_batching_config=self.pool(case) if self.continuous_batching else None,
            **asdict(settings),
        )
        dataset = Dataset.from_list([{"prompt": row.messages} for row in rows])
        self.trainer = GRPOTrainer(model, reward, args, train_dataset=dataset, processing_class=tokenizer)
        self.trainer.remove_callback(PrinterCallback)
        if not case.stop:
            self.trainer.eos_token_ids = [NO_TOKEN]
            self.trainer.generation_config.eos_token_id = NO_TOKEN
            self.trainer.generation_kwargs["eos_token_id"] = NO_TOKEN

    @staticmethod
    def pool(case: Case) -> dict:
        """A pool for every row without sharing, because TRL requests each completion as a separate prompt."""
        block = ContinuousBatchingConfig().block_size
        blocks = case.rows * math.ceil((1.04 * case.length + case.new) / block)
        # without flash-attn it builds masks of (batch tokens, pool tokens): gigabytes at its default of 8,192
        return {"num_blocks": blocks, "max_batch_tokens": 2048}

    def run(self, begin, end):
        self.trainer.add_callback(Turns(begin, end))
        self.trainer.train()

    def updates(self):
        return [
            {name: float(entry[name]) for name in ("learning_rate", "grad_norm")}
            for entry in self.trainer.state.log_history
            if "grad_norm" in entry
        ]


class Turns(TrainerCallback):
    """A callback for which a step begins before its prompts are sampled and ends when the gradients are freed."""

    def __init__(self, begin: Callable[[], None], end: Callable[[], None]):
        self.begin, self.end = begin, end

    def on_step_begin(self, args, state, control, **others):
        self.begin()

    def on_step_end(self, args, state, control, **others):
        self.end()


class TRLCheckpointing(TRL):
    """With gradient checkpointing, which is TRL's default."""

    name = "TRL, gradient checkpointing"
    gradient_checkpointing = True


class TRLContinuousBatching(TRL):
    name = "TRL, continuous batching"
    continuous_batching = True


PEERS = (TRL, TRLCheckpointing, TRLContinuousBatching)
