"""Scoring a model: completions of rows, greedy or sampled, right or wrong, per tier or category."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tqdm import tqdm

from toolx_kernels.engine import SamplingParams
from toolx_kernels.errors import InputError
from toolx_kernels.evaluate.scores import TOO_LONG, Answer, Scores
from toolx_kernels.rollout.prompts import Prompts
from toolx_kernels.rollout.rollout import Rollouter
from toolx_kernels.toolcall.rewards import is_correct
from toolx_kernels.toolcall.rows import Row

Judge = Callable[[str | list[str], Row], bool]  # of a text, or of the turns' texts


def evaluate(
    rollouter: Rollouter,
    prompts: Prompts,
    rows: Sequence[Row],
    params: SamplingParams,
    *,
    n: int = 1,
    ks: Sequence[int] = (),
    judge: Judge = is_correct,
    progress: str | None = None,
) -> Scores:
    """``n`` completions of every row's prompt, judged; with pass@k for each k of ``ks``.

    A row whose prompt leaves no room in the context is answered wrongly, with ``finish_reason`` "context". What a row
    gets depends on the engine's seed, row and its place in ``rows`` alone, not on the other rows. ``progress`` is the
    title of a bar, drawn on a terminal when it takes more than a moment.

    Raises InputError for what ``check_sampling`` refuses; before anything runs.
    """
    check_sampling(params.temperature, n, ks)
    ids = [prompts.ids(row) for row in rows]
    fitting = [place for place, prompt in enumerate(ids) if len(prompt) < prompts.context]
    total, off = n * len(fitting), progress is None
    with tqdm(total=total, desc=progress, unit="answer", delay=2, disable=off or None, dynamic_ncols=True) as bar:

        def count(*_) -> bool:
            bar.update()
            return False

        groups = rollouter.roll_out(
            [rows[place] for place in fitting], [ids[place] for place in fitting], n, params, row_ids=fitting,
            on_rollout=count,
        )  # fmt: skip
    answers = [[Answer("", False, 0, TOO_LONG)] * n for _ in rows]
    for place, rollouts in zip(fitting, groups, strict=True):
        answers[place] = [
            Answer(r.text, bool(judge(r.answer_text, rows[place])), r.written, r.finish_reason) for r in rollouts
        ]
    return Scores(rows, answers, ks)


def check_sampling(temperature: float, n: int, ks: Sequence[int]) -> None:
    """Raises InputError for several greedy completions, which would all be the same, and for pass@k with k > n."""
    if n < 1:
        raise InputError(f"num_generations={n} must be at least 1.")
    if temperature == 0 and n > 1:
        raise InputError(f"num_generations={n} greedy completions would all be the same: give a temperature, say 0.7.")
    for k in ks:
        if not 1 <= k <= n:
            raise InputError(f"pass@{k} takes a k from 1 to num_generations={n}: give another k or more generations.")
