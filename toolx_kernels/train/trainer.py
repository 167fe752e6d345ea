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

import copy
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from toolx_kernels.errors import InputError
from toolx_kernels.rollout import RolloutEngine
from toolx_kernels.toolcall.builtin import Example
from toolx_kernels.toolcall.builtin_turns import Episode
from toolx_kernels.toolcall.demonstrations import DemonstrationIndex
from toolx_kernels.toolcall.readers import rows_from
from toolx_kernels.toolcall.report import dataset_report
from toolx_kernels.toolcall.reward_functions import RewardFunctions
from toolx_kernels.toolcall.rewards import is_correct, no_think_reward
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.toolcall.self_exemplify import INSTRUCTIONS, SelfExemplifyingReward, is_answer_correct
from toolx_kernels.train.checkpoint import load_optimizer, load_state, load_weights, save_checkpoint
from toolx_kernels.train.cold_start import cold_start_examples, supervised
from toolx_kernels.train.collector import Collector
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.curves import draw_curves
from toolx_kernels.train.data import Prompts, digest, shared_rows
from toolx_kernels.train.evaluate import Judge, evaluate
from toolx_kernels.train.hard_sampling import (
    Attempt,
    HardSamplePolicy,
    HardSamples,
    Probe,
    chosen_hard_sample_policy,
)
from toolx_kernels.train.learner import DivergedError, Learner
from toolx_kernels.train.models import load_model, stop_token_ids
from toolx_kernels.train.policies import (
    AdvantageShaper,
    ClippedLoss,
    PolicyLoss,
    PromptSampler,
    chosen_advantage_shaper,
    chosen_prompt_sampler,
)
from toolx_kernels.train.records import rollout_lines, step_values
from toolx_kernels.train.rollouts import Sampler, SingleTurn
from toolx_kernels.train.rounds import VERIFY_STREAM, Rounds
from toolx_kernels.train.run_folder import CURVES, RunFolder
from toolx_kernels.train.schedule import ExponentialDecay
from toolx_kernels.train.scores import Scores
from toolx_kernels.train.tool_loop import ToolLoop


@dataclass(slots=True)
class RunState:
    """Where a run stands: what a checkpoint keeps besides weights and optimizer."""

    step: int = 0  # optimizer steps done
    batch: int = 0  # batches of prompts drawn, one a step unless groups are dropped and filled up
    round: int = -1  # round whose probe was done last
    rows: str = ""  # digest of all rows, those to evaluate on and to demonstrate with included
    table: list[dict] = field(default_factory=list)  # of HardSamples
    schedule: dict = field(default_factory=dict)  # of ExponentialDecay
    hard_before: int | None = None
    eval_before: float | None = None
    tokens: dict[str, int] = field(default_factory=dict)  # written, by purpose
    trained_tokens: int = 0
    unrewarded: int = 0
    seconds: float = 0.0
    lines: dict[str, int] = field(default_factory=dict)  # of the logs when the checkpoint was written

    def to_dict(self) -> dict:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


class ToolExpanderTrainer:
    """Trains ``model`` in place with ToolExpander (arXiv 2510.07737).

    Args:
        model: a transformers causal LM or the name of one (see ``load_model``).
        reward_funcs: one or several ``f(prompts, completions, completion_ids, **columns) -> list[float | None]``, TRL's
            signature, plain or async; their rewards times ``args.reward_weights`` add up, None adds nothing. Default:
            1 for the right calls and nothing else in the completion, else 0; with ``args.self_exemplify``
            ``SelfExemplifyingReward``.
        args: the settings.
        train_dataset, eval_dataset: rows with ``prompt``, ``tools`` and ``answer``.
        processing_class: the tokenizer; may be left out when ``model`` is a name.
        cold_start: examples to imitate before RL, endless; default: the training rows' answers, a part of them with
            demonstrations. Used when ``args.cold_start_steps`` is set.
        demonstrations: more rows that demonstrations are taken from, besides the training rows.
        tools, environment_factory: Python functions, or what makes an environment for each rollout, that the model may
            call in turns; TRL's names and habits, see ``Toolbox``. With either, rollouts have several turns.
        hard_sample_policy, prompt_sampler, advantage_shaper, policy_loss: instead of what ``args`` choose; see the
            protocols in ``hard_sampling`` and ``policies``.

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
        cold_start: Iterator[Example | Episode] | None = None,
        *,
        demonstrations: Sequence[Row] = (),
        tools: Sequence[Callable] = (),
        environment_factory: Callable[[], Any] | None = None,
        hard_sample_policy: HardSamplePolicy | None = None,
        prompt_sampler: PromptSampler | None = None,
        advantage_shaper: AdvantageShaper | None = None,
        policy_loss: PolicyLoss | None = None,
    ):
        self.args = args = args or ToolExpanderConfig()
        self.run = RunFolder(args.output_dir)
        self.run.check(args)
        if train_dataset is None or eval_dataset is None:
            raise InputError("train_dataset and eval_dataset are both needed: see toolx_kernels.train.data.load_rows.")
        self.rows: list[Row] = rows_from(train_dataset)
        self.eval_rows: list[Row] = rows_from(eval_dataset)
        own = SelfExemplifyingReward(distinct=args.distinct_examples) if args.self_exemplify else no_think_reward
        self.judge: Judge = is_answer_correct if args.self_exemplify else is_correct
        reward_funcs = own if reward_funcs is None else reward_funcs
        rewards = RewardFunctions(reward_funcs, args.reward_weights, args.reward_timeout)
        if isinstance(model, str):
            model, processing_class = load_model(model, args.dtype, args.device, args.seed)
        if processing_class is None:
            raise InputError("processing_class is missing: pass the model's tokenizer.")
        self.model, self.tokenizer = model.eval(), processing_class
        context = model.get_decoder().config.max_position_embeddings
        self.prompts = Prompts(self.tokenizer, context, INSTRUCTIONS if args.self_exemplify else "")
        self.engine = RolloutEngine(model, seed=args.seed, compile=args.torch_compile)
        self.sampler: Sampler = SingleTurn(self.engine, self.tokenizer)
        if tools or environment_factory:
            if args.self_exemplify:
                raise InputError(
                    "self_exemplify=True has one turn, with examples, thought and answer: leave tools and "
                    "environment_factory out, or self_exemplify."
                )
            self.sampler = self._tool_loop(tools, environment_factory)
            self.rows, self.eval_rows = self.sampler.offer(self.rows), self.sampler.offer(self.eval_rows)
        self.prompts.check([*self.rows, *self.eval_rows])
        own = {row.id for row in self.rows}
        self.demonstrations = DemonstrationIndex([*self.rows, *(row for row in demonstrations if row.id not in own)])
        self._digest = digest([*self.rows, *self.eval_rows, *demonstrations])
        self.eval_rows_seen = len(shared_rows(self.eval_rows, [*self.rows, *demonstrations]))
        if args.cold_start_steps and cold_start is None:
            self.prompts.check_answers(self.rows)
            cold_start = cold_start_examples(args, self.rows, self.demonstrations)
        self.cold_start = cold_start
        self.learner = Learner(model, args, policy_loss or ClippedLoss(args.loss))
        self.schedule = ExponentialDecay(self.learner.optimizer, args.lr_decay, args.min_lr_rate)
        self.stop_token_ids = stop_token_ids(model, self.tokenizer)
        self.collector = Collector(
            self.rows, self.prompts, self.sampler, self.judge, rewards, args,
            self.stop_token_ids,
        )  # fmt: skip
        self.table = HardSamples(self.rows, demonstrations)
        self.rounds = Rounds(
            self.table,
            hard_sample_policy or self._hard_sample_policy(),
            prompt_sampler or chosen_prompt_sampler(args, len(self.rows)),
            self.collector,
            args,
        )
        self.advantages = advantage_shaper or chosen_advantage_shaper(args)
        self._cautious: Sampler | None = None  # of the model before RL
        self.state = RunState()

    def _tool_loop(self, tools: Sequence[Callable], environment_factory: Callable[[], Any] | None) -> ToolLoop:
        return ToolLoop(
            self.engine,
            self.tokenizer,
            self.prompts,
            tools=tools,
            environment_factory=environment_factory,
            max_turns=self.args.max_tool_calling_iterations + 1,
            tool_timeout=self.args.tool_timeout,
        )

    def _hard_sample_policy(self) -> HardSamplePolicy:
        return chosen_hard_sample_policy(self.args, self.demonstrations, self.fitting, self._verification)

    def fitting(self, row: Row, demonstrations: Sequence[Row]) -> list[Row]:
        """Those of the demonstrations with which the context still holds an answer."""
        return self.prompts.fitting(row, demonstrations, room=self.args.max_completion_length)

    # ---- the run

    def train(self) -> dict:
        """Runs or resumes the whole job; returns the summary, which is also written to ``summary.json``."""
        args, started = self.args, time.perf_counter()
        resumed = self._restore()
        state = self.state
        started -= state.seconds
        with tqdm(total=self._planned_steps(), initial=state.step, unit="step", dynamic_ncols=True) as bar:
            if not resumed:
                self._report_data(bar)
                if args.cold_start_steps:
                    self._cold_start(bar)
                if args.eval_on_start:
                    bar.set_description("evaluating")
                    state.eval_before = self._evaluate_and_log()
                    bar.write(f"held-out accuracy before RL: {state.eval_before:.3f}")
                self._save(started)
            if self.args.needs_reference:
                self.learner.freeze_reference(self.run.path / "checkpoint-0")
            entered = None
            while not self._finished():
                round_index = self.rounds.current
                if round_index != entered:
                    bar.set_description(f"round {round_index + 1}: probing")
                    if self._enter_round(round_index):
                        self._save(started)
                    bar.set_description(f"round {round_index + 1}")
                    entered = round_index
                    if self._finished():  # the probe took what was left of the tokens
                        break
                record = self._step(round_index)
                bar.set_postfix_str(
                    f"reward {record['reward']:.2f}, accuracy {record['accuracy']:.2f}, "
                    f"hard {self.table.hard}, "
                    f"{record['timing']['tokens_per_second']:.0f} tok/s"
                )
                bar.update()
                if not self._finished():
                    if args.eval_steps and state.step % args.eval_steps == 0:
                        self._evaluate_and_log()
                    if state.step % args.save_steps == 0:
                        self._save(started)
            checkpoint = self._save(started)
            bar.set_description("evaluating")
            just_done = state.step == 0 and state.eval_before is not None
            eval_after = state.eval_before if just_done else self._evaluate_and_log()
            bar.set_description("probing")
            counters = self._measure()

        summary = {
            "eval_before": state.eval_before,
            "eval_after": eval_after,
            "hard_before": state.hard_before,
            "hard_after": counters["hard"],
            "probed_rows": counters["rows"],
            "train_rows": len(self.rows),
            "eval_rows": len(self.eval_rows),
            "eval_rows_seen": self.eval_rows_seen,
            "steps": state.step,
            "sampled_tokens": sum(self.collector.tokens.values()),
            "spent_tokens": self.rounds.spent_tokens,
            "trained_tokens": self.rounds.trained_tokens,
            "tokens": dict(self.collector.tokens),
            "wall_seconds": round(time.perf_counter() - started, 1),
            "peak_memory_bytes": peak_memory_bytes(),
            "checkpoint": str(checkpoint),
        }
        self.run.write_summary(summary)
        draw_curves(self.run.metrics(), self.run.path / CURVES, self._title())
        return summary

    def _report_data(self, bar: tqdm) -> None:
        """Says what the training rows hold, and what in them is odd but allowed, before anything is spent on it."""
        report = dataset_report(self.rows, self.demonstrations)
        for line in report.lines():
            bar.write(line)
        if self.eval_rows_seen:
            bar.write(
                f"rows to evaluate on that training or demonstrations show too: {self.eval_rows_seen} of "
                f"{len(self.eval_rows)}"
            )
        self.run.log("data", 0, {}, **asdict(report), eval_rows_seen=self.eval_rows_seen)

    def _planned_steps(self) -> int:
        """Steps that the run takes if no group is dropped and no budget of tokens ends it sooner."""
        return min(self.rounds.total, self.args.max_steps) if self.args.max_steps > 0 else self.rounds.total

    def _finished(self) -> bool:
        args, rounds = self.args, self.rounds
        out_of_tokens = 0 < args.max_tokens <= rounds.spent_tokens
        out_of_steps = 0 < args.max_steps <= self.state.step
        return out_of_tokens or out_of_steps or rounds.batch >= rounds.total

    def _restore(self) -> bool:
        """Opens the run folder; True when a checkpoint was loaded and the run goes on from there."""
        checkpoint = self.run.latest_checkpoint() if self.args.resume else None
        if checkpoint and self.args.needs_reference and not (self.run.path / "checkpoint-0").exists():
            why = f"beta={self.args.beta}" if self.args.beta else "verification='cautious'"
            raise InputError(f"{why} needs {self.run.path}/checkpoint-0, and it is gone: start anew.")
        if checkpoint:
            self.state = state = RunState(**_known(load_state(checkpoint, self.model)))
            load_weights(checkpoint, self.model)
            load_optimizer(checkpoint, self.model, self.learner.optimizer)
            if state.rows != self._digest:
                raise InputError(
                    f"{self.run.path} was run on other rows to train on, to evaluate on or to demonstrate with: resume "
                    "with the same, or start another run."
                )
            try:
                self.schedule.load_state_dict(state.schedule)
                self.table.load(state.table)
            except (KeyError, TypeError, AttributeError) as error:
                raise InputError(
                    f"{checkpoint} holds a damaged state ({error!r}): remove it to resume from an older one."
                ) from None
            self.rounds.batch, self.rounds.round = state.batch, state.round
            self.rounds.trained_tokens = state.trained_tokens
            self.collector.tokens.update(state.tokens)
            self.collector.unrewarded = state.unrewarded
            self.run.forget_after(state.lines)
            self.run.write_hard_samples(state.table)
        elif self.args.resume:  # it was interrupted before its first checkpoint
            self.run.forget_after(dict.fromkeys(self.run.lines(), 0))
        self.run.start(self.args)
        return checkpoint is not None

    def _enter_round(self, round_index: int) -> bool:
        """Probes and logs; whether there was anything to probe."""
        with self._naming(f"probe before step {self.state.step + 1}"):
            found = self.rounds.enter(round_index)
        if found is None:
            return False
        counters = self.table.counters(round_index)
        self._log_probe(found, round_index, counters)
        if round_index == 0:
            self.state.hard_before = counters["hard"]
        return True

    def _measure(self) -> dict[str, int]:
        """Probes the rows of the first round once more, after the run."""
        after = self.rounds.round + 1
        with self._naming("the last probe"):
            found = self.rounds.probe(self.rounds.members(0), after, "measure")
        counters = self.table.counters(after)
        self._log_probe(found, after, counters | {"replaced": None, "without_demonstrations": None})
        return counters

    def _step(self, round_index: int) -> dict:
        """One optimizer step: sample prompts, roll out, reward, advantages, loss, update."""
        args, state, started = self.args, self.state, time.perf_counter()
        with self._naming(f"step {state.step + 1}"):
            groups, sampled = self.rounds.next_groups()
        rolled_out = time.perf_counter()
        advantages = iter(self.advantages(groups).tolist()) if groups else iter(())
        for group in groups:
            group.advantages = [next(advantages) for _ in group.rollouts]
        decays = {"round": round_index, "epoch": (self.rounds.batch - 1) // self.rounds.per_epoch, "step": state.step}
        while self.schedule.count < decays[args.lr_decay_per]:
            self.schedule.step()
        with self._naming(f"step {state.step + 1}"):
            trained = self.learner.improve(groups)
        self.rounds.trained_tokens += trained["trained_tokens"]
        state.step += 1

        for line in rollout_lines(sampled, self.rows, args.num_generations, args.log_completions):
            self.run.log_rollout(step=state.step, **line)
        now = time.perf_counter()
        written = sum(rollout.written for group in sampled for rollout in group.rollouts)
        return self.run.log(
            "step",
            state.step,
            timing={
                "seconds": now - started,
                "rollout_seconds": rolled_out - started,
                "tokens_per_second": written / (rolled_out - started),
            },
            round=round_index,
            **step_values(sampled, dropped=sum(not self.rounds.prompts.keeps(group) for group in sampled)),
            unrewarded=self.collector.unrewarded,
            learning_rate=self.schedule.get_last_lr()[0],
            **trained,
            tokens=sum(self.collector.tokens.values()),
            spent_tokens=self.rounds.spent_tokens,
        )

    def _cold_start(self, bar: tqdm) -> None:
        """Supervised steps on (partly demonstrated) prompts and their answers; linear warm-up and decay."""
        args = self.args
        optimizer = self.learner.adamw(args.cold_start_learning_rate)
        for step in range(1, args.cold_start_steps + 1):
            started, progress = time.perf_counter(), step / args.cold_start_steps
            for parameters in optimizer.param_groups:
                parameters["lr"] = args.cold_start_learning_rate * min(progress / 0.05, 1.05 - progress, 1.0)
            examples = islice(self.cold_start, args.cold_start_batch_size)
            batch, cuts = zip(*(supervised(self.prompts, example) for example in examples), strict=True)
            with self._naming(f"cold-start step {step}"):
                metrics = self.learner.imitate(batch, optimizer)
            seconds = time.perf_counter() - started
            self.run.log("cold_start", step, {"seconds": seconds}, **metrics, demonstrations_cut=sum(cuts))
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

    # ---- probes and evaluations

    def _verification(self, number: int) -> Attempt:
        """How draw ``number`` of demonstrations in this round is verified."""
        stream = VERIFY_STREAM + self.rounds.round * self.args.demonstration_tries + number
        sampler = None
        if self.args.verification == "cautious":
            sampler = self._cautious = self._cautious or self._sampler_of(self.learner.reference)
        return self.collector.attempt(stream, "verify", sampler)

    def _sampler_of(self, model: PreTrainedModel) -> Sampler:
        """As the trainer's own, of another model."""
        sampler = copy.copy(self.sampler)
        sampler.engine = RolloutEngine(model, seed=self.args.seed, compile=self.args.torch_compile)
        return sampler

    def evaluate(self) -> Scores:
        """Greedy answers to the held-out rows, judged."""
        greedy = self.args.sampling(self.stop_token_ids, greedy=True)
        return evaluate(self.sampler, self.prompts, self.eval_rows, greedy, judge=self.judge)

    def _log_probe(self, found: Probe, round_index: int, counters: dict) -> None:
        self.run.log(
            "probe", self.state.step, {"seconds": found.seconds},
            round=round_index, **counters, rollouts=found.rollouts,
            saved_rollouts=len(found.tried) * self.args.probe_rollouts - found.rollouts,
            spent_tokens=self.rounds.spent_tokens,
        )  # fmt: skip
        self.run.write_hard_samples(self.table.lines())

    def _evaluate_and_log(self) -> float:
        started = time.perf_counter()
        scores = self.evaluate()
        parts = {name: score.accuracy.value for name, score in scores.parts.items()}
        timing = {"seconds": time.perf_counter() - started}
        spent = self.rounds.spent_tokens
        self.run.log("eval", self.state.step, timing, accuracy=scores.accuracy, parts=parts, spent_tokens=spent)
        return scores.accuracy

    # ---- the run folder

    def _title(self) -> str:
        names = (self.args.model or type(self.model).__name__, self.args.dataset or "given rows")
        return "{} on {}, seed {}".format(*names, self.args.seed)

    def _save(self, started: float) -> Path:
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            with self._naming(f"checkpoint {self.state.step}"):
                raise DivergedError("the weights are not finite")
        state = self.state
        state.seconds, state.lines = time.perf_counter() - started, self.run.lines()
        state.batch, state.round = self.rounds.batch, self.rounds.round
        state.rows = self._digest
        state.trained_tokens = self.rounds.trained_tokens
        state.table, state.schedule = self.table.lines(), self.schedule.state_dict()
        state.tokens, state.unrewarded = dict(self.collector.tokens), self.collector.unrewarded
        self.engine.forget_prefixes()  # a resumed run will not have them, and must go on as this one does
        return save_checkpoint(
            self.run.path, state.step, self.model, self.tokenizer, self.learner.optimizer, state.to_dict(),
            keep=self.args.save_total_limit, keep_first=self.args.needs_reference,
        )  # fmt: skip


def peak_memory_bytes() -> int:
    """Of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _known(state: dict) -> dict:
    return {name: state[name] for name in RunState.__dataclass_fields__ if name in state}
