"""The cold start: optional supervised steps at the start of a run, their examples and tokens."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import chain, islice

from toolx_kernels.errors import InputError
from toolx_kernels.rollout.prompts import Prompts
from toolx_kernels.rollout.tool_loop import supervised_episode
from toolx_kernels.toolcall.datasets import builtin, builtin_facts, builtin_turns
from toolx_kernels.toolcall.datasets.builtin import Example
from toolx_kernels.toolcall.datasets.builtin_turns import Episode
from toolx_kernels.toolcall.demonstrations import DemonstrationIndex
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.toolcall.self_exemplify import instructions, render_self_exemplified
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.reporter import Reporter
from toolx_kernels.train.task import Task
from toolx_kernels.train.update.batch import PackedGroup
from toolx_kernels.train.update.learner import Learner

OWN_EXAMPLES = 4  # the reward asks for more than three
BEFORE_TURNS = 9600  # single-turn examples that teach the tiny model to copy before it sees episodes


def imitate(
    learner: Learner,
    prompts: Prompts,
    examples: Iterator[Example | Episode],
    args: ToolExpanderConfig,
    report: Reporter,
    naming: Callable[[str], AbstractContextManager],
) -> None:
    """Runs supervised steps on prompts (some with demonstrations) and their answers; linear warm-up and decay.

    ``naming`` is a context that adds the place to the error of a diverged update.
    """
    learner.begin(args.cold_start_learning_rate)
    with report.bar.stretch("cold start", args.cold_start_steps):
        for step in range(1, args.cold_start_steps + 1):
            started, progress = time.perf_counter(), step / args.cold_start_steps
            for parameters in learner.optimizer.base.param_groups:
                parameters["lr"] = args.cold_start_learning_rate * min(progress / 0.05, 1.05 - progress, 1.0)
            taken = list(islice(examples, args.cold_start_batch_size))
            if not taken:
                raise InputError(
                    f"cold_start ended before step {step} of cold_start_steps={args.cold_start_steps}: give one that "
                    "does not end, or fewer steps."
                )
            batch, cuts = zip(*(supervised(prompts, example) for example in taken), strict=True)
            with naming(f"cold-start step {step}"):
                metrics = learner.imitate(batch, step)
            report.cold_start(step, time.perf_counter() - started, metrics | {"demonstrations_cut": sum(cuts)})
    learner.begin(args.learning_rate)


def built_in_cold_start(config: ToolExpanderConfig) -> Iterator[Example | Episode] | None:
    """Returns the examples that come with a built-in task; None for any other dataset."""
    if config.dataset == "builtin":
        return builtin.cold_start_examples(config.seed, config.cold_start_self_exemplify)
    if config.dataset == "builtin-turns":
        copying = islice(builtin.cold_start_examples(config.seed), BEFORE_TURNS)
        return chain(copying, builtin_turns.cold_start_episodes(config.seed))
    if config.dataset == "builtin-facts":
        return builtin_facts.cold_start_examples(config.seed)
    return None


def own_cold_start(config: ToolExpanderConfig, task: Task) -> Iterator[Example]:
    """Returns examples made of the training rows' own answers, and counts the rows that do not fit in the task.

    Raises InputError: rows do not fit the context, and none is to be dropped or all would be.
    """
    answerable = task.prompts.fitting_rows(task.rows, config.overlong, answers=True)
    task.no_examples = len(task.rows) - len(answerable)
    return cold_start_examples(config, answerable, task.demonstrations)


def cold_start_examples(
    config: ToolExpanderConfig, rows: Sequence[Row], demonstrations: DemonstrationIndex
) -> Iterator[Example]:
    """Yields supervised examples from the rows' answers, endlessly.

    A share of them shows demonstrations: a model that never saw a few-shot prompt cannot use one. Another share first
    writes four other rows as its own examples (``config.cold_start_self_exemplify``).
    """
    rng = random.Random(f"cold start {config.seed}")
    while True:
        for row in rng.sample(rows, len(rows)):
            if config.cold_start_self_exemplify and rng.random() < config.cold_start_self_exemplify:
                others = [other for other in rng.sample(rows, min(OWN_EXAMPLES + 1, len(rows))) if other is not row]
                yield Example(row, (), row.answer, tuple(others[:OWN_EXAMPLES]))
                continue
            shown = rng.random() < config.cold_start_demonstrations
            chosen = (
                demonstrations.choose(row, rng, per_tool=config.few_shots_per_tool, limit=config.max_few_shots)
                if shown
                else ()
            )
            yield Example(row, tuple(chosen), row.answer)


def supervised(prompts: Prompts, example: Example | Episode) -> tuple[PackedGroup, int]:
    """Returns the tokens of an example, with as many of its demonstrations as fit, and the number that did not fit.

    Only examples of the self-exemplifying form show its instructions, whatever the form of the run.
    """
    chat, row = prompts.chat, example.row
    if isinstance(example, Episode):
        prompt = prompts.render(row, instructions="")
        ids, mask = supervised_episode(chat, row, prompt, example.turns)
        return PackedGroup(prompt, [ids], [mask]), 0
    if example.examples:
        prompt = prompts.render(row, instructions=instructions(chat.tool_format))
        written = [{"tools": e.tool_names, "question": e.user_text, "answer": e.answer} for e in example.examples]
        thought = ", ".join(call["name"] for call in example.target)
        for left in range(len(written), -1, -1):  # as many as the context holds
            text = render_self_exemplified(written[:left], thought, example.target, chat.tool_format)
            target = chat.turn_ids(text, prompt)
            if len(prompt) + len(target) <= prompts.context:
                break
        return PackedGroup(prompt, [target]), len(written) - left
    prompt = prompts.render(row, instructions="")
    target = chat.completion_ids(example.target, prompt)
    shown = prompts.fitting(row, example.demonstrations, room=len(target))
    cut = len(example.demonstrations) - len(shown)
    return PackedGroup(prompts.render(row, shown, instructions="") if shown else prompt, [target]), cut
