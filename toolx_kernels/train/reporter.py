"""The reporter: all output of a run, on the screen and in its folder's metrics, rollouts, curves and summary."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from toolx_kernels.engine.pool_size import device_memory
from toolx_kernels.errors import InputError
from toolx_kernels.evaluate.scores import Scores
from toolx_kernels.models.adopt import adapter_settings
from toolx_kernels.models.shape import EXPERTS_NOTE, has_experts
from toolx_kernels.progress import ProgressBar
from toolx_kernels.toolcall.datasets.report import dataset_report
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.groups import ScoredGroup
from toolx_kernels.train.hard_sampling import Probe
from toolx_kernels.train.memory.flops import Flops, gemm_speed
from toolx_kernels.train.memory.plan import MemoryPlan
from toolx_kernels.train.memory.planner import plan_of
from toolx_kernels.train.memory.workload import Workload
from toolx_kernels.train.notices import Notices
from toolx_kernels.train.phases import Phases
from toolx_kernels.train.rounds import Rounds
from toolx_kernels.train.run.curves import write_curves
from toolx_kernels.train.run.folder import TRACE, RunFolder
from toolx_kernels.train.step_lines import rollout_lines, step_values
from toolx_kernels.train.task import Task

BETWEEN = ("probe", "evaluation")  # phases outside steps


class Reporter:
    """Collects and writes the output of one run of ``model``; the run's parts record time and memory in ``phases``.

    bar                        shows the progress of the run
    eval_before, hard_before   accuracy and hard rows before RL; None until known
    evaluated                  the last step that was evaluated
    eval_rewards               mean rewards of the first and the last evaluation, if the rewards are the user's own
    """

    def __init__(self, run: RunFolder, model: PreTrainedModel, args: ToolExpanderConfig, task: Task):
        self.run, self.model, self.args, self.task = run, model, args, task
        self.bar = ProgressBar()
        self.phases = Phases(model.device, self.bar)
        self.notices = Notices(args, task.prompts.context, task.own_rewards, self._notice)
        self.eval_before: float | None = None
        self.eval_rewards: list[float] = []
        self.hard_before: int | None = None
        self.evaluated = 0
        self._plan: MemoryPlan | None = None
        self._flops = Flops(model)
        self._gemm_speed: float | None = None  # measured at the first step
        self._reported = self.phases.seconds.copy()  # in the lines of steps so far
        self._earlier = 0.0  # seconds before the run was resumed
        self._started = time.perf_counter()

    def state_dict(self) -> dict:
        return {
            "eval_before": self.eval_before,
            "hard_before": self.hard_before,
            "eval_rewards": self.eval_rewards,
            "evaluated": self.evaluated,
            "wall_seconds": time.perf_counter() - self._started,
            "phases": dict(self.phases.seconds),
            "peaks": dict(self.phases.peaks),
            "notices": self.notices.state_dict(),
            "marks": self.run.marks(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continues from a checkpoint."""
        self.eval_before, self.hard_before = state["eval_before"], state["hard_before"]
        self.evaluated, self.eval_rewards = state["evaluated"], state["eval_rewards"]
        self.notices.load_state_dict(state["notices"])
        self._earlier = state["wall_seconds"]
        self.phases.seconds.update(state["phases"])
        self.phases.peaks.update(state["peaks"])
        self._reported = self.phases.seconds.copy()

    # ---- the run

    @contextmanager
    def running(self, rounds: Rounds) -> Iterator[None]:
        """Context that shows the run's steps on the bar, the only bar until the run ends."""
        args, steps = self.args, rounds.planned_steps
        self._started = time.perf_counter() - self._earlier
        budget = args.max_tokens > 0 or args.max_fe > 0  # may end the run before its last step
        others = logging.is_progress_bar_enabled()  # transformers shows one when saving a checkpoint
        logging.disable_progress_bar()
        try:
            with self.bar.stretch("step", None if budget else steps, rounds.step, rounds.progress):
                yield
        finally:
            if others:
                logging.enable_progress_bar()

    def plan(self, workload: Workload) -> None:
        """Plans the run's memory from its settings, if that is possible for its model."""
        device = self.model.device
        memory = device_memory(device)
        dtype: Any = str(self.model.dtype).removeprefix("torch.")
        args = replace(self.args, dtype=dtype, **adapter_settings(self.model))
        try:
            self._plan = plan_of(self.model.config, args, device=device.type, memory=memory, workload=workload)
        except InputError:
            self._plan = None

    def beginning(self) -> None:
        """Reports dataset statistics, warnings and planned memory before the run starts."""
        task, report = self.task, dataset_report(self.task.rows, self.task.demonstrations)
        if has_experts(self.model.get_decoder().config):
            self.bar.write(f"model: {EXPERTS_NOTE}")
        for line in report.lines():
            self.bar.write(line)
        self.bar.write(f"calls: {task.prompts.chat.describe()}")
        if task.eval_rows_seen:
            self.bar.write(
                f"evaluation rows that are also training rows or demonstrations: {task.eval_rows_seen} of "
                f"{len(task.eval_rows)}"
            )
        self.run.log("data", 0, {}, **asdict(report), eval_rows_seen=task.eval_rows_seen, left_out=task.left_out)
        given = len(task.rows) + len(task.eval_rows) + task.left_out
        self.notices.rows(task.left_out, given, task.no_examples, len(task.rows))
        if self._plan:
            self.bar.write(self._plan.sentence())
            self.run.log("plan", 0, self._plan.to_dict())

    def _notice(self, step: int, name: str, sentence: str) -> None:
        self.bar.write(f"notice: {sentence}")
        self.run.log("notice", step, {}, name=name, sentence=sentence)

    def cold_start(self, step: int, seconds: float, metrics: dict) -> None:
        self.run.log("cold_start", step, {"seconds": seconds}, **metrics)
        self.bar.results(f"loss {metrics['loss']:.3f}")
        self.bar.advance()

    def evaluation(self, rounds: Rounds, evaluate: Callable[[], Scores]) -> float:
        """Runs ``evaluate`` and logs its scores; returns the accuracy."""
        started = time.perf_counter()
        with self.phases.phase("evaluation"):
            scores = evaluate()
        timing = {"seconds": time.perf_counter() - started}
        parts = {name: score.accuracy.value for name, score in scores.parts.items()}
        own = {} if scores.reward is None else {"reward": scores.reward}
        self.eval_rewards = [*self.eval_rewards[:1], *own.values()]
        self.run.log("eval", rounds.step, timing, accuracy=scores.accuracy, parts=parts, **own, **rounds.spent)
        self.notices.evaluation(rounds.step, scores)
        self.evaluated = rounds.step
        return scores.accuracy

    def before(self, accuracy: float | None) -> None:
        self.eval_before = accuracy
        measured = "not measured, as there is no eval_dataset" if accuracy is None else f"{accuracy:.3f}"
        reward = f", mean reward {self.eval_rewards[-1]:.3f}" if self.eval_rewards else ""
        self.bar.write(f"accuracy before RL: {measured}{reward}")

    def probe(self, rounds: Rounds, found: Probe, round_index: int, counters: dict) -> None:
        """Logs the result of a probe, and the table of all rows."""
        saved = len(found.tried) * self.args.probe_rollouts - found.rollouts
        counts = {"rollouts": found.rollouts, "saved_rollouts": saved, "round_rows": rounds.round_rows, **rounds.spent}
        self.run.log("probe", rounds.step, {"seconds": found.seconds}, round=round_index, **counters, **counts)
        self.notices.probe(rounds.step, counters, rounds.round_rows, rounds.per_round)
        self.run.write_hard_samples(rounds.table.lines())

    # ---- a step

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Context around the work of step ``number``: times it, and profiles it if it is ``profile_step``."""
        self.run.check_started()
        if self._gemm_speed is None:
            self._gemm_speed = gemm_speed(self.model.device, self.model.dtype)
        profiler = torch.profiler.profile() if number == self.args.profile_step else None
        with profiler or nullcontext():
            started, before = time.perf_counter(), self.phases.seconds.copy()
            between = {name: spent for name, spent in self.phases.since(self._reported).items() if name in BETWEEN}
            yield
            self._step = time.perf_counter() - started, between | self.phases.since(before)
            self._reported = self.phases.seconds.copy()
        if profiler:
            profiler.export_chrome_trace(str(self.run.path / TRACE))

    def metrics(
        self,
        step: int,
        round_index: int,
        sampled: Sequence[ScoredGroup] = (),
        learned: Sequence[ScoredGroup] = (),
        trained: Sequence[ScoredGroup] = (),
        dropped: int = 0,
        **values,
    ) -> dict:
        """Logs a step and returns its line of metrics.jsonl. Without ``sampled`` groups it is supervised: event "sft".

        Args:
            sampled: all sampled groups.
            learned: those selected to learn from.
            trained: those of ``learned`` that have a gradient.
            dropped: number of groups that the prompt order dropped.
            values: further columns.

        The line's ``timing``:

        seconds             of the whole step
        phases              seconds of each phase: rollout, reward, forward, backward, optimizer; also probe and
                            evaluation since the previous step
        tokens_per_second   written tokens per second of the rollout phase
        flop_share          FLOPs per second (``Flops``), as a share of what a plain GEMM in the weights' dtype reaches;
                            None if there is no memory for that GEMM
        """
        seconds, phases = self._step
        if not sampled:
            timing = {"seconds": seconds, "phases": phases}
            return self.run.log("sft", step, timing, round=round_index, **values)
        flops = self._flops.sampled(sampled)
        flops += self._flops.trained(trained, self.args.num_iterations, reference=bool(self.args.beta))
        written = sum(rollout.written for group in sampled for rollout in group.rollouts)
        timing = {
            "seconds": seconds,
            "phases": phases,
            "tokens_per_second": written / phases["rollout"],
            "flop_share": flops / seconds / self._gemm_speed if self._gemm_speed else None,
        }
        for line in rollout_lines(sampled, learned, self.task.rows, self.args.log_completions):
            self.run.log_rollout(step=step, **line)
        values |= step_values(sampled, dropped) | {"floored": sum(group.least_std > 0 for group in learned)}
        record = self.run.log("step", step, timing, round=round_index, **values)
        self.notices.step(record, sampled, learned)
        return record

    def progress(self, record: dict, rounds: Rounds) -> None:
        """Advances the bar by a step."""
        if record["event"] == "sft":
            self.bar.results(f"loss {record['loss']:.3f}")
        else:
            self.bar.results(
                f"reward {record['reward']:.2f}",
                f"acc {record['accuracy']:.2f}",
                f"hard {rounds.table.hard}",
                f"{record['timing']['tokens_per_second']:.0f} tok/s",
            )
        self.bar.advance(share=rounds.progress)

    # ---- the end

    def summary(self, eval_after: float | None, probed: dict, checkpoint: Path, rounds: Rounds) -> dict:
        """Writes ``summary.json`` and ``curves.png``; ``probed`` has the counters of the last probe."""
        task, peaks, collector = self.task, self.phases.peaks, rounds.collector
        before = self.eval_rewards[0] if self.eval_rewards and self.eval_before is not None else None
        after = self.eval_rewards[-1] if self.eval_rewards else None
        summary = {
            "eval_before": self.eval_before,
            "eval_after": eval_after,
            **({"eval_reward_before": before, "eval_reward_after": after} if task.own_rewards else {}),
            "hard_before": self.hard_before,
            "hard_after": probed["hard"],
            "probed_rows": probed["rows"],
            "train_rows": len(task.rows),
            "eval_rows": len(task.eval_rows),
            "eval_rows_seen": task.eval_rows_seen,
            "steps": rounds.step,
            "sampled_tokens": sum(collector.tokens.values()),
            **rounds.spent,
            "trained_tokens": rounds.trained_tokens,
            "tokens": dict(collector.tokens),
            "prefilled": dict(collector.prefilled),
            "wall_seconds": round(time.perf_counter() - self._started, 1),
            "peak_memory_bytes": max(peaks.values(), default=0),
            "phases": {name: round(spent, 1) for name, spent in self.phases.seconds.items()},
            "memory": self._plan.compared(peaks) if self._plan else None,
            "checkpoint": str(checkpoint),
            "notices": self.notices.end(rounds.step),
        }
        self.run.write_summary(summary)
        write_curves(self.run.path, model=type(self.model).__name__)
        return summary
