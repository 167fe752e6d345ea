"""What the built-in records decide, computed from their committed runs.

    python -m bench.learning.verdict bench/results/learning

reads ``builtin-facts/runs.json`` and ``builtin/runs.json`` there and writes ``verdict.md`` and ``verdict.json``. The
rules were fixed before the runs:

- ``retry`` becomes the default if its paired 95 % intervals (Student's t over seeds) in held-out accuracy on
  builtin-facts lie above 0 against ``grpo`` and against ``replace``, and the one against ``grpo`` on builtin excludes
  a loss of more than .03. (That no real model contradicts it is judged by hand.)
- ``sft-grpo`` or ``sft-retry`` is recommended to whoever has demonstrations if it is ahead of ``retry`` on
  builtin-facts with its interval clear of 0.
- Every other arm is reported beside ``grpo`` with intervals adjusted for their number (Holm 1979, Scand. J. Statist.
  6, p. 65): of m arms ordered by their p-values the k-th has the confidence 1 - .05 / (m - k + 1), and from the first
  whose interval contains 0 on, none differs. The m are all arms that are not named above; where fewer seeds ran, their
  pairs say so.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from toolx_kernels.compare.arms import paired_difference
from toolx_kernels.evaluate.intervals import CONFIDENCE, Estimate, mean_of
from toolx_kernels.evaluate.tables import estimate, markdown
from toolx_kernels.files import write_atomically

DEFAULT, BASELINE, PAPER = "retry", "grpo", "replace"
WITH_DEMONSTRATIONS = ("sft-grpo", "sft-retry")
LARGEST_LOSS = 0.03  # of held-out accuracy on builtin

Ends = dict[str, dict[int, float]]  # the last value of a curve, by arm and seed


def ends(runs: Iterable[Mapping], event: str, value: str) -> Ends:
    """Of ``runs.json``: the last ``value`` of an ``event`` in each run."""
    of_arms: Ends = {}
    for run in runs:
        arm, seed = re.fullmatch(r"(.+)-seed(\d+)", run["run"]).groups()
        of_arms.setdefault(arm, {})[int(seed)] = [each[value] for each in run["events"] if each["event"] == event][-1]
    return of_arms


def p_value(differences: Iterable[float]) -> float:
    """Of the two-sided paired t test; 1 where there are fewer than two pairs."""
    from scipy.stats import ttest_1samp

    values = [*differences]
    if len(values) < 2:
        return 1.0
    if len(set(values)) == 1:
        return float(values[0] == 0)
    return float(ttest_1samp(values, 0.0).pvalue)


def holm(ours: Mapping[str, Mapping[int, float]], theirs: Mapping[int, float]) -> dict[str, dict]:
    """Differences of arms to one other, paired by seed, with intervals adjusted for their number."""
    differences = {arm: [ends[seed] - theirs[seed] for seed in ends if seed in theirs] for arm, ends in ours.items()}
    order = sorted(differences, key=lambda arm: p_value(differences[arm]))
    result, distinct = {}, True
    for place, arm in enumerate(order):
        confidence = 1 - (1 - CONFIDENCE) / (len(order) - place)
        mean = mean_of(differences[arm], confidence)
        distinct = distinct and clear(mean)
        result[arm] = {
            "pairs": len(differences[arm]),
            "difference": mean,
            "confidence": confidence,
            "differs": distinct,
        }
    return result


def clear(difference: Estimate | None) -> bool:
    """Whether an interval does not contain 0."""
    return difference is not None and difference.low is not None and (difference.low > 0 or difference.high < 0)


def above(difference: Estimate | None, bound: float = 0.0) -> bool:
    return difference is not None and difference.low is not None and difference.low > bound


def verdict(facts: list[dict], builtin: list[dict]) -> dict:
    """All differences that the rules ask for, and what follows."""
    accuracy = {"builtin-facts": ends(facts, "eval", "accuracy"), "builtin": ends(builtin, "eval", "accuracy")}
    hard = {"builtin-facts": ends(facts, "probe", "hard"), "builtin": ends(builtin, "probe", "hard")}

    def minus(task: str, arm: str, other: str) -> dict:
        of_accuracy = paired_difference(accuracy[task][arm], accuracy[task][other])
        of_hard = paired_difference(hard[task][arm], hard[task][other])
        return {
            "task": task,
            "arm": arm,
            "minus": other,
            "pairs": of_accuracy.pairs,
            "accuracy": of_accuracy.mean,
            "hard": of_hard.mean,
        }

    conditions = [
        minus("builtin-facts", DEFAULT, BASELINE),
        minus("builtin-facts", DEFAULT, PAPER),
        minus("builtin", DEFAULT, BASELINE),
    ]
    holds = [above(each["accuracy"], bound) for each, bound in zip(conditions, (0, 0, -LARGEST_LOSS), strict=True)]
    beside = [minus("builtin-facts", arm, DEFAULT) for arm in WITH_DEMONSTRATIONS]
    named = {BASELINE, DEFAULT, PAPER, *WITH_DEMONSTRATIONS}
    others = {arm: of_seeds for arm, of_seeds in accuracy["builtin-facts"].items() if arm not in named}
    return {
        "default": [each | {"holds": one} for each, one in zip(conditions, holds, strict=True)],
        "default_is_retry": all(holds),
        "with_demonstrations": beside,
        "recommended_with_demonstrations": [each["arm"] for each in beside if above(each["accuracy"])],
        "other_arms": holm(others, accuracy["builtin-facts"][BASELINE]),
    }


def page(found: Mapping) -> str:
    def row(each: Mapping) -> list[str]:
        what = f"{each['task']}: {each['arm']} minus {each['minus']}"
        return [what, str(each["pairs"]), estimate(each["accuracy"], 3, "+"), estimate(each["hard"], 1, "+")]

    head = ["difference, paired by seed", "pairs", "held-out accuracy", "hard rows"]
    rules = [[*head, "holds"]]
    rules += [[*row(each), "yes" if each["holds"] else "no"] for each in found["default"]]
    beside = [head, *(row(each) for each in found["with_demonstrations"])]
    others = [["builtin-facts, minus grpo", "pairs", "held-out accuracy", "confidence", "differs"]]
    for arm, each in found["other_arms"].items():
        numbers = estimate(each["difference"], 3, "+"), f"{100 * each['confidence']:.2f} %"
        others.append([arm, str(each["pairs"]), *numbers, "yes" if each["differs"] else "no"])
    recommended = ", ".join(found["recommended_with_demonstrations"]) or "none"
    return "\n\n".join(
        [
            markdown(rules),
            f"Default: {DEFAULT if found['default_is_retry'] else 'as it was'}.",
            markdown(beside),
            f"Ahead of {DEFAULT} with an interval clear of 0: {recommended}.",
            markdown(others),
            "95 % intervals of Student's t over seeds; those of the last table are adjusted for their number (Holm). "
            "The rules stand in bench/learning/verdict.py.\n",
        ]
    )


def plain(value: object) -> object:
    if isinstance(value, Estimate):
        return {"value": value.value, "interval": value[1:]}
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list) else value


def main(folder: str) -> None:
    root = Path(folder)
    facts, builtin = (json.loads((root / task / "runs.json").read_text()) for task in ("builtin-facts", "builtin"))
    found = verdict(facts, builtin)
    write_atomically(root / "verdict.md", page(found))
    write_atomically(root / "verdict.json", json.dumps(plain(found), indent=1) + "\n")
    print(page(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
