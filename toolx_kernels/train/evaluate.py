"""Scoring a model: greedy completions of held-out rows, right or wrong, per tier or category."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from toolx_kernels.rollout import RolloutEngine, SamplingParams
from toolx_kernels.toolcall.rewards import is_correct
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.train.data import Prompts


def generate_greedy(engine: RolloutEngine, prompts: Prompts, rows: Sequence[Row], params: SamplingParams) -> list[str]:
    """The model's most likely completion of every row, as text."""
    groups = engine.generate([prompts.ids(row) for row in rows], 1, params)
    return [prompts.tokenizer.decode(group.completions[0].ids, skip_special_tokens=True) for group in groups]


def accuracy_of(rows: Sequence[Row], texts: Sequence[str], judge=is_correct) -> tuple[float, dict[str, float]]:
    """Share of rows answered rightly: over all, and for each tier or BFCL category that rows name."""
    right = [judge(text, row) for row, text in zip(rows, texts, strict=True)]
    of_part: dict[str, list[bool]] = defaultdict(list)
    for row, ok in zip(rows, right, strict=True):
        if part := row.columns.get("tier") or row.columns.get("category"):
            of_part[str(part)].append(ok)
    return sum(right) / len(right), {part: sum(oks) / len(oks) for part, oks in of_part.items()}
