"""Evaluation of a model: completions of rows, greedy or sampled, each judged right or wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from toolx_kernels.engine import SamplingParams
from toolx_kernels.errors import InputError
from toolx_kernels.evaluate.scores import TOO_LONG, Answer, Scores, check_sampling
from toolx_kernels.progress import ProgressBar
from toolx_kernels.rollout.prompts import Prompts
from toolx_kernels.rollout.rollout import Rollout, Rollouter
from toolx_kernels.toolcall.rewards import is_correct
from toolx_kernels.toolcall.rows import Row

Judge = Callable[[Any, Row], bool]  # of a text, or of the turns' texts


def evaluate(
    rollouter: Rollouter,
    prompts: Prompts,
    rows: Sequence[Row],
    params: SamplingParams,
    *,
    n: int = 1,
    ks: Sequence[int] = (),
    judge: Judge = is_correct,
    bar: ProgressBar | None = None,
    title: str = "evaluation",
    reward: Callable[[Sequence[Row], Sequence[Rollout]], Sequence[float]] | None = None,
) -> Scores:
    """Samples and judges ``n`` completions of each row's prompt; with pass@k for each k of ``ks``.

    A row whose prompt leaves no room in the context counts as wrong, with ``finish_reason`` "context". A row's answers
    depend only on the engine's seed, the row and its place in ``rows``, not on other rows. ``bar`` shows the finished
    completions, under ``title``. ``reward`` gives the rewards of completions, which answers keep; for a row that leaves
    no room they have none.

    Raises InputError for no rows, and for what ``check_sampling`` and ``Chat.check`` refuse, before anything runs.
    """
    check_sampling(params.temperature, n, ks)
    if not rows:
        raise InputError("There are no rows to evaluate on: pass at least one (to a trainer, as eval_dataset).")
    prompts.chat.check(rows)
    ids = [prompts.ids(row) for row in rows]
    fitting = [place for place, prompt in enumerate(ids) if len(prompt) < prompts.context]
    bar = bar or ProgressBar(shown=False)
    with bar.stretch(title, n * len(fitting)):

        def count(*_: object) -> bool:
            bar.advance()
            return False

        fitting_rows, fitting_ids = [rows[place] for place in fitting], [ids[place] for place in fitting]
        groups = rollouter.roll_out(fitting_rows, fitting_ids, n, params, row_ids=fitting, on_rollout=count)
    answers = [[Answer("", False, 0, TOO_LONG)] * n for _ in rows]
    rewards: Iterator[float] = iter(())
    if reward:
        of_rollouts = [row for row in fitting_rows for _ in range(n)]
        rewards = iter(reward(of_rollouts, [rollout for rollouts in groups for rollout in rollouts]))
    for place, rollouts in zip(fitting, groups, strict=True):
        answers[place] = [
            Answer(r.text, bool(judge(r.answer_text, rows[place])), r.written, r.finish_reason, next(rewards, None))
            for r in rollouts
        ]
    return Scores(rows, answers, ks)
