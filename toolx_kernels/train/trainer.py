"""The training run, top to bottom.

    cold start -> evaluate -> for each round: probe, replace hard prompts ->
        for each step: sample prompts, roll out, reward, advantages, pack, loss, update -> evaluate -> summary

An epoch is a permutation of the training rows, cut into batches of ``prompts_per_step``; what does not fill a batch
waits for another epoch. A row is hard by its calls alone, while the default reward also asks for nothing but calls.

What this is not: it knows one device and no distributed training. Everything random is a function of (seed, step,
row), so a resumed run goes on bit for bit where the checkpoint stood.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from toolx_kernels.engine import RolloutEngine
from toolx_kernels.errors import DivergedError, InputError
from toolx_kernels.evaluate.evaluate import Judge, evaluate
from toolx_kernels.evaluate.scores import Scores
from toolx_kernels.models.adapters import add_adapter, has_adapter
from toolx_kernels.models.load import load_model, stop_token_ids
from toolx_kernels.rollout.prompts import Prompts
from toolx_kernels.rollout.rollout import Rollouter
from toolx_kernels.rollout.single_turn import SingleTurn
from toolx_kernels.rollout.tool_loop import ToolLoop
from toolx_kernels.toolcall.datasets.builtin import Example
from toolx_kernels.toolcall.datasets.builtin_turns import Episode
from toolx_kernels.toolcall.datasets.read import rows_from
from toolx_kernels.toolcall.datasets.report import dataset_report
from toolx_kernels.toolcall.demonstrations import DemonstrationIndex
from toolx_kernels.toolcall.reward_runner import RewardFunctions
from toolx_kernels.toolcall.rewards import is_correct, no_think_reward
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.toolcall.self_exemplify import INSTRUCTIONS, SelfExemplifyingReward, is_answer_correct
from toolx_kernels.train.cold_start import cold_start_examples, supervised
from toolx_kernels.train.collect import Collector
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.demonstrators import HardSamplePolicy, chosen_hard_sample_policy
from toolx_kernels.train.hard_sampling import Attempt, HardSamples, Probe
from toolx_kernels.train.memory.work import Work
from toolx_kernels.train.policies import (
    AdvantageShaper,
    ClippedLoss,
    PolicyLoss,
    PromptOrder,
    chosen_advantage_shaper,
    chosen_prompt_order,
)
from toolx_kernels.train.records import rollout_lines, step_values
from toolx_kernels.train.reporter import Accounts, describe_timing
from toolx_kernels.train.rounds import VERIFY_STREAM, Rounds
from toolx_kernels.train.rows import digest, shared_rows
from toolx_kernels.train.run.checkpoint import resumable_checkpoint, save_checkpoint
from toolx_kernels.train.run.curves import draw_curves
from toolx_kernels.train.run.folder import CURVES, TRACE, RunFolder, binding_settings, check_same_settings
from toolx_kernels.train.run.state import RunState, check_reference
from toolx_kernels.train.run.stopping import Stop
from toolx_kernels.train.update.learner import Learner
from toolx_kernels.train.update.reference_model import ReferenceModel, ReferenceRollouter
from toolx_kernels.train.update.schedule import ExponentialDecay


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
        hard_sample_policy, prompt_order, advantage_shaper, policy_loss: instead of what ``args`` choose; see the
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
        prompt_order: PromptOrder | None = None,
        advantage_shaper: AdvantageShaper | None = None,
        policy_loss: PolicyLoss | None = None,
    ):
        self.args = args = args or ToolExpanderConfig()
        self.run = RunFolder(args.output_dir)
        self.run.check(args)
        if train_dataset is None or eval_dataset is None:
            raise InputError("train_dataset and eval_dataset are both needed: see toolx_kernels.train.rows.load_rows.")
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
        if has_adapter(model):
            raise InputError(
                f"The model {args.model or model.name_or_path} is an adapter on its base: name the base with use_peft, "
                "or merge the adapter into it first (peft's merge_and_unload)."
            )
        if args.use_peft:
            add_adapter(model, args)
        context = model.get_decoder().config.max_position_embeddings
        self.prompts = Prompts(self.tokenizer, context, INSTRUCTIONS if args.self_exemplify else "")
        self.engine = RolloutEngine(model, seed=args.seed, compile=args.torch_compile)
        self.rollouter: Rollouter = SingleTurn(self.engine, self.tokenizer)
        if tools or environment_factory:
            if args.self_exemplify:
                raise InputError(
                    "self_exemplify=True has one turn, with examples, thought and answer: leave tools and "
                    "environment_factory out, or self_exemplify."
                )
            self.rollouter = self._tool_loop(tools, environment_factory)
            self.rows, self.eval_rows = self.rollouter.offer(self.rows), self.rollouter.offer(self.eval_rows)
        self.prompts.check([*self.rows, *self.eval_rows])
        self.demonstrations = DemonstrationIndex.of(self.rows, demonstrations)
        self.eval_rows_seen = len(shared_rows(self.eval_rows, [*self.rows, *demonstrations]))
        if args.cold_start_steps and cold_start is None:
            self.prompts.check_answers(self.rows)
            cold_start = cold_start_examples(args, self.rows, self.demonstrations)
        self.cold_start = cold_start
        self.accounts = Accounts(model, args)
        self.phases = self.accounts.phases
        self.learner = Learner(model, args, policy_loss or ClippedLoss(args.loss), self.phases, self._release_pools)
        self.schedule = self._new_schedule()
        self.stop_token_ids = stop_token_ids(model, self.tokenizer)
        self.collector = Collector(
            self.rows, self.prompts, self.rollouter, self.judge, rewards, args,
            self.stop_token_ids, self.phases,
        )  # fmt: skip
        self.table = HardSamples(self.rows, demonstrations)
        self.data = {
            "training rows": digest(self.rows),
            "rows to evaluate on": digest(self.eval_rows),
            "demonstrations": digest(demonstrations),
        }
        self.rounds = Rounds(
            self.table,
            hard_sample_policy or self._hard_sample_policy(),
            prompt_order or chosen_prompt_order(args, len(self.rows)),
            self.collector,
            args,
        )
        self.advantages = advantage_shaper or chosen_advantage_shaper(args)
        self._cautious: Rollouter | None = None  # of the model before RL
        self.state = RunState()
        self.stop = Stop()

    def _new_schedule(self) -> ExponentialDecay:
        return ExponentialDecay(self.learner.updater.optimizer, self.args.lr_decay, self.args.min_lr_rate)

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

    def train(self, stop: Stop | None = None) -> dict:
        """Runs or resumes the whole job; returns the summary, which is also written to ``summary.json``.

        Raises:
            Stopped: ``stop`` was told to; a step that had begun is finished and saved then, a probe or an evaluation
                is left at once and repeated by the resumed run. No signal handler is installed here.
        """
        args, started = self.args, time.perf_counter()
        self.stop = stop or self.stop
        resumed = self._restore()
        state = self.state
        started -= state.seconds
        if args.profile_step > self._planned_steps():
            raise InputError(
                f"profile_step={args.profile_step} is beyond the {self._planned_steps()} steps of this run."
            )
        work = Work.of(args, self.prompts, self.demonstrations, self.rows, self.eval_rows)
        plan = self.accounts.plan(work)
        with tqdm(total=self._planned_steps(), initial=state.step, unit="step", dynamic_ncols=True) as bar:
            if not resumed:
                self._report_data(bar)
                if plan:
                    bar.write(plan.sentence())
                    self.run.log("plan", 0, plan.to_dict())
                if args.cold_start_steps:
                    self._cold_start(bar)
                if args.eval_on_start:
                    bar.set_description("evaluating")
                    state.eval_before = self._evaluate_and_log()
                    bar.write(f"held-out accuracy before RL: {state.eval_before:.3f}")
                self._save(started)
            if self.args.needs_reference:
                self.learner.reference = ReferenceModel(self.model, self.run.path / "checkpoint-0")
            entered = None
            while not self._finished():
                if args.eval_steps and state.step % args.eval_steps == 0 and state.evaluated != state.step:
                    self._evaluate_and_log()
                    state.evaluated = state.step
                round_index = self.rounds.current
                if round_index != entered:
                    bar.set_description(f"round {round_index + 1}: probing")
                    if self._enter_round(round_index):
                        self._save(started)
                    bar.set_description(f"round {round_index + 1}")
                    entered = round_index
                    if self._finished():  # the probe took what was left of the tokens
                        break
                with self.stop.deferred():
                    with self.accounts.profiled(state.step + 1, self.run.path / TRACE):
                        record = self._step(round_index)
                    self._forget_prefixes()
                    if self.stop.requested or (state.step % args.save_steps == 0 and not self._finished()):
                        self._save(started)
                bar.set_postfix_str(
                    f"reward {record['reward']:.2f}, accuracy {record['accuracy']:.2f}, hard {self.table.hard}, "
                    f"{describe_timing(record['timing'])}"
                )
                bar.update()
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
            **self.accounts.summary(plan),
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
        checkpoint = resumable_checkpoint(self.run.path, self.model) if self.args.resume else None
        if checkpoint:
            check_reference(self.run.path / "checkpoint-0", self.args)
            state = RunState(**checkpoint.state)
            check_same_settings(checkpoint.path, state.settings, self.args)
            state.check_data(self.run.path, self.data)
            checkpoint.copy_into(self.model, self.learner.updater)
            self.state = state
            self.schedule.load_state_dict(state.schedule)
            self.table.load(state.table)
            self.rounds.batch, self.rounds.round = state.batch, state.round
            self.rounds.trained_tokens = state.trained_tokens
            self.collector.tokens.update(state.tokens)
            self.collector.unrewarded = state.unrewarded
            self.accounts.resume(state.phases, state.peaks)
            if state.token_budget:
                self.learner.token_budget = min(self.args.micro_batch_tokens, state.token_budget)
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
        args, state, timing = self.args, self.state, self.accounts.start_step()
        with self._naming(f"step {state.step + 1}"):
            groups, sampled = self.rounds.next_groups()
            advantages = iter(self.advantages(groups).tolist()) if groups else iter(())
            for group in groups:
                group.advantages = [next(advantages) for _ in group.rollouts]
            self._decay(round_index)
            told = self.learner.improve(groups, state.step)
        cost = timing(sampled, self.learner.needed(groups))
        self.rounds.trained_tokens += told["trained_tokens"]
        state.step += 1

        for line in rollout_lines(sampled, self.rows, args.num_generations, args.log_completions):
            self.run.log_rollout(step=state.step, **line)
        return self.run.log(
            "step",
            state.step,
            timing=cost,
            round=round_index,
            **step_values(sampled, dropped=sum(not self.rounds.prompts.keeps(group) for group in sampled)),
            unrewarded=self.collector.unrewarded,
            learning_rate=self.schedule.get_last_lr()[0],
            **told,
            tokens=sum(self.collector.tokens.values()),
            spent_tokens=self.rounds.spent_tokens,
        )

    def _decay(self, round_index: int) -> None:
        """Brings the learning rate to where it is to be in the next step."""
        epoch = (self.rounds.batch - 1) // self.rounds.per_epoch
        due = {"round": round_index, "epoch": epoch, "step": self.state.step}[self.args.lr_decay_per]
        while self.schedule.count < due:
            self.schedule.step()

    def _cold_start(self, bar: tqdm) -> None:
        """Supervised steps on (partly demonstrated) prompts and their answers; linear warm-up and decay."""
        args = self.args
        self.learner.begin(args.cold_start_learning_rate)
        for step in range(1, args.cold_start_steps + 1):
            started, progress = time.perf_counter(), step / args.cold_start_steps
            for parameters in self.learner.updater.optimizer.param_groups:
                parameters["lr"] = args.cold_start_learning_rate * min(progress / 0.05, 1.05 - progress, 1.0)
            examples = islice(self.cold_start, args.cold_start_batch_size)
            batch, cuts = zip(*(supervised(self.prompts, example) for example in examples), strict=True)
            with self._naming(f"cold-start step {step}"):
                metrics = self.learner.imitate(batch, step)
            seconds = time.perf_counter() - started
            self.run.log("cold_start", step, {"seconds": seconds}, **metrics, demonstrations_cut=sum(cuts))
            bar.set_description(f"cold start {step}/{args.cold_start_steps}, loss {metrics['loss']:.3f}")
        self.learner.begin(args.learning_rate)
        self.schedule = self._new_schedule()

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
        rollouter = None
        if self.args.verification == "cautious":
            rollouter = self._cautious = self._cautious or self._reference_rollouter()
        return self.collector.attempt(stream, "verify", rollouter)

    def _reference_rollouter(self) -> ReferenceRollouter:
        """As the trainer's own, of the model before RL."""
        frozen, rollouter = self.learner.reference, copy.copy(self.rollouter)
        rollouter.engine = RolloutEngine(frozen.model, seed=self.args.seed, compile=self.args.torch_compile)
        return ReferenceRollouter(frozen, rollouter)

    def evaluate(self) -> Scores:
        """Greedy answers to the held-out rows, judged."""
        greedy = self.args.sampling(self.stop_token_ids, greedy=True)
        return evaluate(self.rollouter, self.prompts, self.eval_rows, greedy, judge=self.judge)

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
        with self.phases.phase("evaluation"):
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

    def _release_pools(self) -> bool:
        """Gives the memory of the KV pools back, for as long as nothing is sampled; whether there was any."""
        return any([rollouter.engine.release_pool() for rollouter in (self.rollouter, self._cautious) if rollouter])

    def _forget_prefixes(self) -> None:
        """A resumed run has none and must go on as this one does; called wherever a run may be resumed."""
        for rollouter in (self.rollouter, self._cautious):
            if rollouter:
                rollouter.engine.forget_prefixes()

    def _save(self, started: float) -> Path:
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            with self._naming(f"checkpoint {self.state.step}"):
                raise DivergedError("the weights are not finite")
        state = self.state
        state.seconds, state.lines = time.perf_counter() - started, self.run.lines()
        state.phases, state.peaks = dict(self.phases.seconds), dict(self.phases.peaks)
        shrunk = self.learner.token_budget < self.args.micro_batch_tokens
        state.token_budget = self.learner.token_budget if shrunk else 0
        state.batch, state.round = self.rounds.batch, self.rounds.round
        state.settings, state.data = binding_settings(self.args), self.data
        state.trained_tokens = self.rounds.trained_tokens
        state.table, state.schedule = self.table.lines(), self.schedule.state_dict()
        state.tokens, state.unrewarded = dict(self.collector.tokens), self.collector.unrewarded
        self._forget_prefixes()
        with self.stop.deferred():
            return save_checkpoint(
                self.run.path, state.step, self.model, self.tokenizer, self.learner.updater, state.to_dict(),
                keep=self.args.save_total_limit, keep_first=self.args.needs_reference,
            )  # fmt: skip
