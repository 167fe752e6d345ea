"""The trainer: a training run, top to bottom.

    cold start -> evaluate -> for each round: probe, give hard prompts demonstrations ->
        for each step: prompts -> rollouts -> rewards -> retries -> selection -> advantages -> update
    -> evaluate -> probe -> summary

Five parts do the work: the task (rows, prompts, judge, rewards), the collector (rollouts and their rewards), the rounds
(the next prompts), the learner (weights) and the reporter (all output).

An epoch is a permutation of the training rows, cut into batches of ``prompts_per_step``; rows that do not fill a batch
wait for another epoch.

What this is not: it uses one device, without distributed training. Everything random is a function of (seed, step,
row), so a resumed run continues bit for bit from its checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from toolx_kernels.engine import RolloutEngine
from toolx_kernels.errors import DivergedError, InputError
from toolx_kernels.evaluate.evaluate import evaluate
from toolx_kernels.evaluate.scores import Scores
from toolx_kernels.models.load import stop_token_ids
from toolx_kernels.models.shape import context_of
from toolx_kernels.toolcall.datasets.builtin import Example
from toolx_kernels.toolcall.datasets.builtin_turns import Episode
from toolx_kernels.toolcall.datasets.read import rows_from
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.train.arguments import check_arguments
from toolx_kernels.train.cold_start import imitate, own_cold_start
from toolx_kernels.train.collect import Collector, chosen_rollouter
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.hard_sampling import HardSamples
from toolx_kernels.train.memory.workload import Workload
from toolx_kernels.train.policies.advantages import AdvantageShaper, chosen_advantage_shaper, give_advantages
from toolx_kernels.train.policies.hard_samples import HardSamplePolicy, chosen_hard_sample_policy
from toolx_kernels.train.policies.imitation import Imitation
from toolx_kernels.train.policies.loss import ClippedLoss, PolicyLoss
from toolx_kernels.train.policies.prompt_order import PromptOrder, chosen_prompt_order
from toolx_kernels.train.policies.selection import GroupSelector, chosen_group_selector
from toolx_kernels.train.reporter import Reporter
from toolx_kernels.train.rounds import Rounds
from toolx_kernels.train.run.checkpoint import save_checkpoint
from toolx_kernels.train.run.folder import RunFolder, binding_settings
from toolx_kernels.train.run.resuming import checkpoint_to_resume, rewind
from toolx_kernels.train.run.stopping import Stop
from toolx_kernels.train.task import Task, judge_and_rewards, prompts_of, reward_process
from toolx_kernels.train.update.learner import Learner
from toolx_kernels.train.update.policy_model import policy_model
from toolx_kernels.train.update.reference_model import ReferenceModel
from toolx_kernels.train.verification import Verification

# parts whose state a checkpoint keeps, besides weights and optimizer
WITH_STATE = ("rounds", "collector", "imitation", "learner", "reporter")


class ToolExpanderTrainer:
    """Trains ``model`` in place with ToolExpander (arXiv 2510.07737).

    Args:
        model: a transformers causal LM or its name (see ``load_model``). If it has a LoRA adapter, from peft's
            ``get_peft_model`` or transformers' ``add_adapter``, that adapter is trained (see ``adopt_adapter``).
        reward_funcs: one or several ``f(prompts, completions, completion_ids, **columns) -> list[float | None]``, TRL's
            signature, sync or async; the sum of their rewards times ``args.reward_weights`` counts, None adds nothing;
            tried once before any work. Default: those that ``args.reward_funcs`` names, else 1 for the right calls and
            nothing else in the completion and 0 otherwise; with ``args.self_exemplify`` ``SelfExemplifyingReward``.
        args: the settings.
        train_dataset, eval_dataset: rows with ``prompt``, ``tools`` and ``answer``. Without ``eval_dataset`` nothing is
            evaluated: the summary's ``eval_rows`` is 0, and its accuracies are None.
        processing_class: the tokenizer; default if ``model`` is a name: the one loaded with it.
        cold_start: endless iterator of examples to imitate before RL; default: the training rows' answers, some with
            demonstrations. Used if ``args.cold_start_steps`` is set.
        demonstrations: additional rows to take demonstrations from, besides the training rows.
        tools, environment_factory: Python functions, or a function that makes an environment for each rollout, that the
            model may call in several turns; names and behavior as in TRL, see ``Toolbox``.
        hard_sample_policy, prompt_order, group_selector, advantage_shaper, policy_loss: replace what ``args`` choose;
            see the protocols in ``policies`` and docs/remedies.md.

    Raises:
        InputError: an argument has the wrong type, or rows, prompts, run folder or model do not fit; raised before any
            work is done.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | PathLike,
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
        group_selector: GroupSelector | None = None,
        advantage_shaper: AdvantageShaper | None = None,
        policy_loss: PolicyLoss | None = None,
    ):
        check_arguments(
            model,
            reward_funcs,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            demonstrations=demonstrations,
            cold_start=cold_start,
            hard_sample_policy=hard_sample_policy,
            prompt_order=prompt_order,
            group_selector=group_selector,
            advantage_shaper=advantage_shaper,
            policy_loss=policy_loss,
        )
        args = (args or ToolExpanderConfig()).settled(own_rewards=reward_funcs is not None)
        self.run = RunFolder(args.output_dir)
        self.run.check(args)
        reward_funcs = reward_process(args) if reward_funcs is None else reward_funcs
        self.args = args = self.run.settled(args)
        rows = rows_from(train_dataset)
        eval_rows = [] if eval_dataset is None else rows_from(eval_dataset, for_training=False)
        self.model, self.tokenizer = policy_model(model, processing_class, args)
        self.engine = RolloutEngine(self.model, seed=args.seed, compile=args.torch_compile)
        prompts = prompts_of(args, self.tokenizer, context_of(self.model.get_decoder().config), args.self_exemplify)
        chat = prompts.chat
        judging = judge_and_rewards(args, reward_funcs, chat)
        self.rollouter = chosen_rollouter(args, self.engine, prompts, tools, environment_factory)
        chat.check([*rows, *eval_rows, *demonstrations])
        offered = [self.rollouter.offer(those) for those in (rows, eval_rows)]
        rows, eval_rows = (prompts.fitting_rows(those, args.overlong) for those in offered)
        left_out = sum(map(len, offered)) - len(rows) - len(eval_rows)
        given = (rows, eval_rows, demonstrations, prompts)
        self.task = task = Task(*given, *judging, left_out, args.demonstrate_training_rows)
        if args.cold_start_steps and cold_start is None:
            cold_start = own_cold_start(args, task)
        self.cold_start = cold_start
        self.reporter = Reporter(self.run, self.model, args, task)
        stops, phases = stop_token_ids(self.model, chat), self.reporter.phases
        self.greedy = args.sampling(stops, greedy=True)
        self.collector = Collector(task, self.rollouter, args, stops, phases)
        self.learner = Learner(self.model, args, policy_loss or ClippedLoss(args.loss), phases, self._release_pools)
        self.verification = Verification(args, self.collector, self.learner, lambda: self.rounds.probed_round)
        self.imitation = Imitation(args, task)
        self.rounds = Rounds(
            HardSamples(rows, demonstrations),
            hard_sample_policy or chosen_hard_sample_policy(args, task.demonstrations, prompts, self.verification),
            prompt_order or chosen_prompt_order(args, len(rows)),
            self.collector,
            args,
        )
        self.group_selector = group_selector or chosen_group_selector(args)
        self.advantage_shaper = advantage_shaper or chosen_advantage_shaper(args)
        self.stop = Stop()
        self._begun = False  # a run that has begun has changed the model

    # ---- the run

    def train(self, stop: Stop | None = None) -> dict:
        """Runs or resumes the whole job; returns the summary, which is also written to ``summary.json``.

        Raises:
            InputError: among others: the run folder is in use, or this trainer has run and is not told to resume.
            Stopped: ``stop`` was requested. A step in progress is finished and saved first; a probe or an evaluation
                ends at once and is repeated by the resumed run. No signal handler is installed here.
        """
        self.stop = stop or self.stop
        with self.run.writing(self.args):
            return self._run()

    def _run(self) -> dict:
        args, task, rounds, report = self.args, self.task, self.rounds, self.reporter
        task.try_rewards(args.num_generations)
        resumed = self._resume()
        report.plan(Workload.of(args, task.prompts, task.demonstrations, task.rows, task.eval_rows))
        with ExitStack() as after, report.running(rounds):
            if not resumed:
                report.beginning()
                self._cold_start()
                self._save()
            if args.eval_on_start and rounds.step == 0 and report.eval_before is None:
                report.before(self._evaluate())
                self._save()
            if args.needs_reference:
                self.learner.reference = ReferenceModel(self.model, self.run.path / "checkpoint-0")
                after.callback(self.learner.reference.close)
            while not self.finished:
                if args.eval_steps and rounds.step % args.eval_steps == 0 and rounds.step != report.evaluated:
                    self._evaluate()
                elif rounds.at_round_start and (self.imitation.ended or not rounds.policy.needs_probe):
                    self._probe()  # which raw prompts get no solved rollout?
                else:
                    with self.stop.deferred():
                        report.progress(self.step(), rounds)
                        if self.stop.requested or (rounds.step % args.save_steps == 0 and not self.finished):
                            self._save()
            checkpoint = self._save()
            accuracy = report.eval_before if rounds.step == 0 and report.eval_before is not None else self._evaluate()
            probed = self._measure()
        return report.summary(accuracy, probed, checkpoint, rounds)

    @property
    def finished(self) -> bool:  # by steps, epochs, tokens or forward-equivalents
        return self.rounds.finished or self.imitation.over

    def step(self) -> dict:
        """Runs one optimizer step; returns its line of metrics.jsonl."""
        number = self.rounds.step + 1
        with self._naming(f"step {number}"), self.reporter.step(number):
            told = self._improve() if self.imitation.ended else self._imitate()
        self._forget_prefixes()
        return self.reporter.metrics(number, **told | self.rounds.spent)

    def _imitate(self) -> dict:
        """Runs a supervised step on demonstrations."""
        index, update = self.rounds.next_round, self.imitation.step(self.learner, self.rounds.step)
        self.rounds.finish_step(update, supervised=True)
        self.imitation.end(self.rounds.progress)
        return {"round_index": index, **update}

    def _improve(self) -> dict:
        """Runs an RL step."""
        rounds, learner, index, progress = self.rounds, self.learner, self.rounds.next_round, self.rounds.progress
        groups, sampled = rounds.next_groups()
        groups = self.group_selector(groups)
        give_advantages(groups, self.advantage_shaper)
        learner.schedule.advance_to(rounds.passed(self.args.lr_decay_per))
        update = learner.improve(groups, rounds.step, *self.imitation.beside(groups, progress))
        rounds.finish_step(update)
        return {
            "round_index": index,
            "sampled": sampled,
            "learned": groups,
            "trained": learner.needed(groups),
            "dropped": sum(not rounds.order.keeps(group) for group in sampled),
            "unrewarded": self.collector.unrewarded,
            "learning_rate": learner.schedule.get_last_lr()[0],
            **update,
            "tokens": sum(self.collector.tokens.values()),
        }

    def evaluate(self) -> Scores:
        """Scores greedy answers to the held-out rows; with their rewards, if these are the user's own."""
        task, bar = self.task, self.reporter.bar
        reward = self.collector.total_rewards if task.own_rewards else None
        asked = (task.prompts, task.eval_rows, self.greedy)
        return evaluate(self.rollouter, *asked, judge=task.judge, bar=bar, reward=reward)

    # ---- its parts

    def _cold_start(self) -> None:
        if self.args.cold_start_steps and self.cold_start is not None:
            imitate(self.learner, self.task.prompts, self.cold_start, self.args, self.reporter, self._naming)

    def _evaluate(self) -> float | None:
        """Logs the held-out accuracy and returns it; None without rows to evaluate on."""
        return self.reporter.evaluation(self.rounds, self.evaluate) if self.task.eval_rows else None

    def _probe(self) -> None:
        """Probes the next round's rows, then saves, because a probe may take long."""
        rounds, report = self.rounds, self.reporter
        with self._naming(f"probe before step {rounds.step + 1}"):
            found = rounds.begin_round()
        if found:
            probed = rounds.probed_round  # an earlier round than the next if a smaller run skipped some of its rows
            counters = rounds.table.counters(probed)
            report.probe(rounds, found, probed, counters)
            if probed == 0:
                report.hard_before = counters["hard"]
            self._save()

    def _measure(self) -> dict[str, int | None]:
        """Probes the rows of the first round again; returns their counters."""
        rounds, after = self.rounds, self.rounds.probed_round + 1
        with self._naming("the last probe"):
            found = rounds.measure()
        counters = rounds.table.counters(after) | {"replaced": None, "without_demonstrations": None}
        self.reporter.probe(rounds, found, after, counters)
        return counters

    @contextmanager
    def _naming(self, where: str) -> Iterator[None]:
        """Context that adds the place and the last good checkpoint to the error of a diverged update."""
        try:
            yield
        except DivergedError as error:
            last = self.run.latest_checkpoint() or "none yet"
            lower = " or ".join(name for name in ("learning_rate", "beta", "sft_coef") if getattr(self.args, name))
            raise DivergedError(f"{where}: {error}; the last good checkpoint is {last}; lower {lower}.") from None

    # ---- checkpoints

    def _save(self) -> Path:
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            with self._naming(f"checkpoint {self.rounds.step}"):
                raise DivergedError("the weights are not finite")
        state = {name: getattr(self, name).state_dict() for name in WITH_STATE}
        state |= {"settings": binding_settings(self.args), "data": self.task.identity}
        self._forget_prefixes()
        self.run.check_lock()
        with self.stop.deferred():
            return save_checkpoint(
                self.run.path,
                self.rounds.step,
                self.model,
                self.tokenizer,
                self.learner.optimizer,
                state,
                keep=self.args.save_total_limit,
                keep_first=self.args.needs_reference,
            )

    def _resume(self) -> bool:
        """Opens the run folder; returns True if a checkpoint was loaded to continue from."""
        run, resume = self.run, self.args.resume
        checkpoint = checkpoint_to_resume(run, self.model, self.args, self.task) if resume else None
        if self._begun and not checkpoint:
            raise InputError(f"This trainer has changed its model: make another one to start {run.path} again.")
        if resume:
            self.reporter.bar.write(rewind(run, checkpoint))
        self._begun = True
        if checkpoint:
            checkpoint.copy_into(self.model, self.learner.optimizer)
            for name in WITH_STATE:
                getattr(self, name).load_state_dict(checkpoint.state[name])
            run.write_hard_samples(self.rounds.table.lines())
        run.start(self.args)
        return checkpoint is not None

    def _release_pools(self) -> bool:
        """Frees the memory of the KV pools until something is sampled again; returns whether there was any."""
        return any([rollouter.engine.release_pool() for rollouter in self.verification.rollouters])

    def _forget_prefixes(self) -> None:
        """Called wherever a run may be resumed: a resumed run has no prefixes and must continue exactly as this one."""
        for rollouter in self.verification.rollouters:
            rollouter.engine.forget_prefixes()
