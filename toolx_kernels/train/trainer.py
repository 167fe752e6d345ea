"""The training run, top to bottom.

    cold start -> evaluate -> for each round: probe, replace hard prompts ->
        for each step: sample prompts, roll out, reward, advantages, pack, loss, update -> evaluate -> summary

An epoch is a permutation of the training rows, cut into batches of ``prompts_per_step``; what does not fill a batch
waits for another epoch. A row is hard by its calls alone, while the default reward also asks for nothing but calls.

What this is not: it updates once per batch, so the policy that samples is the policy that is trained and the ratio
of the clipped loss is exactly 1; it knows one device and no distributed training. Everything random is a function of
(seed, step, row), so a resumed run goes on bit for bit where the checkpoint stood.
"""

from __future__ import annotations

import math
import random
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from toolx_kernels.errors import InputError
from toolx_kernels.ops.advantages import group_advantages
from toolx_kernels.rollout import Completion, Group, RolloutEngine
from toolx_kernels.toolcall.builtin import Example
from toolx_kernels.toolcall.readers import rows_from
from toolx_kernels.toolcall.rewards import call_reward, is_correct, no_think_reward
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.train.batch import PackedGroup
from toolx_kernels.train.checkpoint import load_optimizer, load_state, load_weights, save_checkpoint
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.curves import draw_curves
from toolx_kernels.train.data import Prompts, cold_start_examples
from toolx_kernels.train.evaluate import accuracy_of, generate_greedy
from toolx_kernels.train.hard_sampling import HardSamplePolicy, PlainGRPO, Probe, ReplaceHard, probe
from toolx_kernels.train.learner import DivergedError, Learner
from toolx_kernels.train.models import load_model, stop_token_ids
from toolx_kernels.train.run_folder import CURVES, RunFolder

PROBE_STREAM = 1 << 31  # probes draw from other random streams than training steps


@dataclass(slots=True)
class RunState:
    """Where a run stands: what a checkpoint keeps besides weights and optimizer."""

    step: int = 0  # optimizer steps done
    round: int = -1  # round whose probe was done last
    probed: list[int] = field(default_factory=list)  # training rows of that probe
    hard: list[int] = field(default_factory=list)  # those of them that it found hard
    hard_before: int | None = None
    eval_before: float | None = None
    tokens: int = 0  # sampled so far
    seconds: float = 0.0
    lines: dict[str, int] = field(default_factory=dict)  # of the logs when the checkpoint was written


class ToolExpanderTrainer:
    """Trains ``model`` in place with ToolExpander (arXiv 2510.07737).

    Args:
        model: a transformers causal LM or the name of one (see ``load_model``).
        reward_funcs: one or several ``f(prompts, completions, completion_ids, **columns) -> list[float | None]``, TRL's
            signature; their rewards add up, None adds nothing. Default: 1 for the right calls and nothing
            else in the completion, else 0.
        args: the settings.
        train_dataset, eval_dataset: rows with ``prompt``, ``tools`` and ``answer``.
        processing_class: the tokenizer; may be left out when ``model`` is a name.
        cold_start: examples to imitate before RL, endless; default: the training rows' answers, a part of them with
            demonstrations. Used when ``args.cold_start_steps`` is set.

    Raises:
        InputError: rows, prompts, run folder or model do not fit; before any work is done.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        reward_funcs: Callable | Sequence[Callable] | None = None,
        args: ToolExpanderConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class: PreTrainedTokenizerBase | None = None,
        cold_start: Iterator[Example] | None = None,
    ):
        self.args = args = args or ToolExpanderConfig()
        self.run = RunFolder(args.output_dir)
        self.run.check(args)
        if train_dataset is None or eval_dataset is None:
            raise InputError("train_dataset and eval_dataset are both needed: see toolx_kernels.train.data.load_rows.")
        self.rows: list[Row] = rows_from(train_dataset)
        self.eval_rows: list[Row] = rows_from(eval_dataset)
        self.reward_funcs = [reward_funcs] if callable(reward_funcs) else list(reward_funcs or [no_think_reward])
        for func in self.reward_funcs:
            if not callable(func):
                raise InputError(f"reward_funcs holds {func!r}: give functions.")
        if isinstance(model, str):
            model, processing_class = load_model(model, args.dtype, args.device, args.seed)
        if processing_class is None:
            raise InputError("processing_class is missing: pass the model's tokenizer.")
        self.model, self.tokenizer = model.eval(), processing_class
        context = model.get_decoder().config.max_position_embeddings
        self.prompts = Prompts(self.tokenizer, context)
        self.prompts.check([*self.rows, *self.eval_rows])
        if args.cold_start_steps and cold_start is None:
            self.prompts.check_answers(self.rows)
            cold_start = cold_start_examples(args, self.rows)
        self.cold_start = cold_start
        self.engine = RolloutEngine(model, seed=args.seed, compile=args.torch_compile)
        self.stop_token_ids = stop_token_ids(model, self.tokenizer)
        self.policy: HardSamplePolicy = PlainGRPO()
        if args.hard_sampling == "replace":
            self.policy = ReplaceHard(
                self.rows, args.seed, args.few_shots_per_tool, args.max_few_shots, self.prompts.fitting
            )
        self.learner = Learner(model, args)
        self.state = RunState()
        self.steps_per_epoch = max(1, len(self.rows) // args.prompts_per_step)
        self.steps_per_round = self.steps_per_epoch * args.epochs_per_round
        self.total_steps = args.num_train_epochs * self.steps_per_epoch
        if args.max_steps > 0:
            self.total_steps = min(self.total_steps, args.max_steps)

    # ---- the run

    def train(self) -> dict:
        """Runs or resumes the whole job; returns the summary, which is also written to ``summary.json``."""
        args, started = self.args, time.perf_counter()
        resumed = self._restore()
        state = self.state
        started -= state.seconds
        with tqdm(total=self.total_steps, initial=state.step, unit="step", dynamic_ncols=True) as bar:
            if not resumed:
                if args.cold_start_steps:
                    self._cold_start(bar)
                bar.set_description("evaluating")
                state.eval_before = self._evaluate_and_log()
                bar.write(f"held-out accuracy before RL: {state.eval_before:.3f}")
                self._save(started)
            if args.beta:
                self.learner.freeze_reference(self.run.path / "checkpoint-0")
            entered = None
            while state.step < self.total_steps:
                round_index = state.step // self.steps_per_round
                if round_index != entered:
                    bar.set_description(f"round {round_index + 1}: probing")
                    self._enter_round(round_index)
                    bar.set_description(f"round {round_index + 1}")
                    entered = round_index
                record = self._step(state.step, round_index)
                state.step += 1
                bar.set_postfix_str(
                    f"reward {record['reward']:.2f}, accuracy {record['accuracy']:.2f}, hard {len(state.hard)}, "
                    f"{record['timing']['tokens_per_second']:.0f} tok/s"
                )
                bar.update()
                if state.step < self.total_steps:
                    if args.eval_steps and state.step % args.eval_steps == 0:
                        self._evaluate_and_log()
                    if state.step % args.save_steps == 0:
                        self._save(started)
            checkpoint = self._save(started)
            bar.set_description("evaluating")
            eval_after = self._evaluate_and_log()
            bar.set_description("probing")
            probed = self._members_of_round(0)
            last_probe = self._probe(probed, state.round + 1)
            self._log_probe(last_probe, state.round + 1, len(probed), len(last_probe.hard), replaced=None)

        summary = {
            "eval_before": state.eval_before,
            "eval_after": eval_after,
            "hard_before": state.hard_before,
            "hard_after": len(last_probe.hard),
            "probed_rows": len(probed),
            "train_rows": len(self.rows),
            "eval_rows": len(self.eval_rows),
            "steps": state.step,
            "sampled_tokens": state.tokens,
            "wall_seconds": round(time.perf_counter() - started, 1),
            "peak_memory_bytes": peak_memory_bytes(),
            "checkpoint": str(checkpoint),
        }
        self.run.write_summary(summary)
        draw_curves(self.run.metrics(), self.run.path / CURVES, self._title())
        return summary

    def _restore(self) -> bool:
        """Opens the run folder; True when a checkpoint was loaded and the run goes on from there."""
        checkpoint = self.run.latest_checkpoint() if self.args.resume else None
        if checkpoint and self.args.beta and not (self.run.path / "checkpoint-0").exists():
            raise InputError(f"beta={self.args.beta} needs {self.run.path}/checkpoint-0, and it is gone: start anew.")
        if checkpoint:
            self.state = RunState(**_known(load_state(checkpoint, self.model)))
            load_weights(checkpoint, self.model)
            load_optimizer(checkpoint, self.model, self.learner.optimizer)
            self.run.forget_after(self.state.lines)
        elif self.args.resume:  # it was interrupted before its first checkpoint
            self.run.forget_after(dict.fromkeys(self.run.lines(), 0))
        self.run.start(self.args)
        return checkpoint is not None

    def _enter_round(self, round_index: int) -> None:
        """Probes the round's raw prompts, then lets the policy choose what it shows with the hard ones.

        Of a round that is gone on with only those rows are probed that a smaller ``max_steps`` had left out.
        """
        state = self.state
        if state.round != round_index:
            state.round, state.probed, state.hard = round_index, [], []
        new = sorted(set(self._members_of_round(round_index)) - set(state.probed))
        found = self._probe(new, round_index) if new else None
        if found:
            state.probed += new
            state.hard += found.hard
        self.policy.start_round(round_index, state.hard)
        if found:
            shown = sum(bool(self.policy.demonstrations(i)) for i in state.hard)
            self._log_probe(found, round_index, len(state.probed), len(state.hard), shown)
        if round_index == 0:
            state.hard_before = len(state.hard)

    def _step(self, step: int, round_index: int) -> dict:
        """One optimizer step: sample prompts, roll out, reward, advantages, loss, update."""
        args, started = self.args, time.perf_counter()
        members = self._members(step)
        rows = [self.rows[i] for i in members]
        shown = [self.policy.demonstrations(i) for i in members]
        with self._naming(f"step {step + 1}"):
            groups, texts = self._generate(members, shown, args.num_generations, step)
        rolled_out = time.perf_counter()
        rewards = self._rewards(rows, groups, texts)
        correct = [[is_correct(text, row) for text in of_row] for row, of_row in zip(rows, texts, strict=True)]
        advantages = group_advantages(rewards, group_size=args.num_generations, scale=args.scale_rewards)
        learning_rate = args.learning_rate * args.lr_decay**round_index
        with self._naming(f"step {step + 1}"):
            trained = self.learner.improve(groups, advantages, learning_rate)

        completions = [c for group in groups for c in group.completions]
        n_tokens = sum(len(c.ids) for c in completions)
        self._log_rollouts(step, rows, shown, texts, rewards, advantages)
        now = time.perf_counter()
        return self.run.log(
            "step",
            step + 1,
            timing={
                "seconds": now - started,
                "rollout_seconds": rolled_out - started,
                "tokens_per_second": n_tokens / (rolled_out - started),
            },
            round=round_index,
            reward=float(rewards.mean()),
            accuracy=sum(map(sum, correct)) / len(completions),
            solved=sum(map(any, correct)) / len(rows),
            replaced=sum(map(bool, shown)),
            learning_rate=learning_rate,
            **trained,
            sampler_entropy=sum(sum(c.entropies) for c in completions) / n_tokens,
            completion_length=n_tokens / len(completions),
            truncated=sum(c.finish_reason == "length" for c in completions) / len(completions),
            tokens=self.state.tokens,
        )

    def _cold_start(self, bar: tqdm) -> None:
        """Supervised steps on (partly demonstrated) prompts and their answers; linear warm-up and decay."""
        args = self.args
        optimizer = self.learner.adamw(args.cold_start_learning_rate)
        for step in range(1, args.cold_start_steps + 1):
            started, progress = time.perf_counter(), step / args.cold_start_steps
            for parameters in optimizer.param_groups:
                parameters["lr"] = args.cold_start_learning_rate * min(progress / 0.05, 1.05 - progress, 1.0)
            batch = []
            for example in islice(self.cold_start, args.cold_start_batch_size):
                target = self.prompts.completion_ids(example.target)
                shown = self.prompts.fitting(example.row, example.demonstrations, room=len(target))
                batch.append(PackedGroup(self.prompts.ids(example.row, shown), [target]))
            with self._naming(f"cold-start step {step}"):
                metrics = self.learner.imitate(batch, optimizer)
            self.run.log("cold_start", step, {"seconds": time.perf_counter() - started}, **metrics)
            bar.set_description(f"cold start {step}/{args.cold_start_steps}, loss {metrics['loss']:.3f}")

    @contextmanager
    def _naming(self, where: str) -> Iterator[None]:
        """Says of a diverged update where it happened and what is left."""
        try:
            yield
        except DivergedError as error:
            last = self.run.latest_checkpoint() or "none yet"
            raise DivergedError(
                f"{where}: {error}; the last good checkpoint is {last}; lower the learning rate."
            ) from None

    # ---- rollouts

    def _members(self, step: int) -> list[int]:
        """The training rows of a step: each epoch is a permutation of them, cut into equal batches."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = list(range(len(self.rows)))
        random.Random(f"epoch {self.args.seed} {epoch}").shuffle(order)
        return order[place * self.args.prompts_per_step :][: self.args.prompts_per_step]

    def _generate(
        self,
        members: list[int],
        shown: Sequence[Sequence[Row]],
        n: int,
        step: int,
        first_rollout: int = 0,
        on_completion: Callable[[int, int, Completion], bool] | None = None,
    ) -> tuple[list[Group], list[list[str]]]:
        """Samples ``n`` completions of each row's prompt with its demonstrations; returns groups and their texts."""
        groups = self.engine.generate(
            [self.prompts.ids(self.rows[i], demos) for i, demos in zip(members, shown, strict=True)],
            n,
            self.args.sampling(self.stop_token_ids),
            row_ids=members,
            step=step,
            first_rollout=first_rollout,
            on_completion=on_completion,
        )
        for i, group in zip(members, groups, strict=True):
            for completion in group.completions:
                if not math.isfinite(sum(completion.logprobs) + sum(completion.entropies)):
                    raise DivergedError(f"the model's log-probs on row {self.rows[i].id} are not finite")
        self.state.tokens += sum(len(c.ids) for group in groups for c in group.completions)
        return groups, [[self._text(c.ids) for c in group.completions] for group in groups]

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _rewards(self, rows: list[Row], groups: list[Group], texts: list[list[str]]) -> Tensor:
        size = self.args.num_generations
        flat_rows = [row for row in rows for _ in range(size)]
        flat_texts = [text for of_row in texts for text in of_row]
        flat_ids = [c.ids for group in groups for c in group.completions]
        total = torch.zeros(len(flat_rows))
        for func in self.reward_funcs:
            total += torch.tensor([r or 0.0 for r in call_reward(func, flat_rows, flat_texts, flat_ids)])
        return total

    def _members_of_round(self, round_index: int) -> list[int]:
        """The training rows that the steps of a round use, in dataset order."""
        first = round_index * self.steps_per_round
        steps = range(first, min(first + self.steps_per_round, self.total_steps))
        return sorted({row for step in steps for row in self._members(step)})

    def _probe(self, members: list[int], round_index: int) -> Probe:
        """Finds the rows among ``members`` whose raw prompts get no correct rollout."""

        def correct(members: list[int], n: int, first: int) -> list[bool]:
            solved = [False] * len(members)

            def ends_its_group(place: int, _: int, completion: Completion) -> bool:
                solved[place] |= is_correct(self._text(completion.ids), self.rows[members[place]])
                return solved[place]

            with self._naming(f"probe before step {self.state.step + 1}"):
                nothing = [()] * len(members)
                self._generate(members, nothing, n, PROBE_STREAM + round_index, first, ends_its_group)
            return solved

        return probe(members, self.args.probe_rollouts, correct)

    def evaluate(self) -> tuple[float, dict[str, float]]:
        """Greedy exact-match accuracy on the held-out rows, over all and per tier or category."""
        greedy = self.args.sampling(self.stop_token_ids, greedy=True)
        return accuracy_of(self.eval_rows, generate_greedy(self.engine, self.prompts, self.eval_rows, greedy))

    def _log_probe(self, found: Probe, round_index: int, rows: int, hard: int, replaced: int | None) -> None:
        self.run.log(
            "probe", self.state.step, {"seconds": found.seconds},
            round=round_index, rows=rows, hard=hard, replaced=replaced, rollouts=found.rollouts,
        )  # fmt: skip

    def _evaluate_and_log(self) -> float:
        started = time.perf_counter()
        accuracy, parts = self.evaluate()
        timing = {"seconds": time.perf_counter() - started}
        self.run.log("eval", self.state.step, timing, accuracy=accuracy, parts=parts)
        return accuracy

    # ---- the run folder

    def _title(self) -> str:
        names = (self.args.model or type(self.model).__name__, self.args.dataset or "given rows")
        return "{} on {}, seed {}".format(*names, self.args.seed)

    def _save(self, started: float) -> Path:
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            with self._naming(f"checkpoint {self.state.step}"):
                raise DivergedError("the weights are not finite")
        self.state.seconds = time.perf_counter() - started
        self.state.lines = self.run.lines()
        self.engine.forget_prefixes()  # a resumed run will not have them, and must go on as this one does
        return save_checkpoint(
            self.run.path, self.state.step, self.model, self.tokenizer, self.learner.optimizer, asdict(self.state),
            keep=self.args.save_total_limit, keep_first=bool(self.args.beta),
        )  # fmt: skip

    def _log_rollouts(self, step, rows, shown, texts, rewards, advantages) -> None:
        size = self.args.num_generations
        for place in range(min(self.args.log_completions, len(rows) * size)):
            row, completion = (place % len(rows)), place // len(rows)
            flat = row * size + completion
            self.run.log_rollout(
                step=step + 1,
                row=rows[row].id,
                demonstrations=[demo.id for demo in shown[row]],
                prompt=rows[row].user_text,
                completion=texts[row][completion],
                reward=float(rewards[flat]),
                advantage=float(advantages[flat]),
            )


def peak_memory_bytes() -> int:
    """Of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _known(state: dict) -> dict:
    return {name: state[name] for name in RunState.__dataclass_fields__ if name in state}
