"""Verdict of the built-in records, computed from their committed runs.

    python -m bench.learning.verdict bench/results/learning

reads ``builtin-facts/runs.json`` and ``builtin/runs.json`` there and writes ``verdict.md`` and ``verdict.json``. The
rules were fixed before the runs:

- ``retry`` becomes the default if its paired 95 % intervals (Student's t over seeds) in held-out accuracy on
  builtin-facts lie above 0 against ``grpo`` and against ``replace``, and the one against ``grpo`` on builtin excludes
  a loss of more than .03. (That no real model contradicts it is judged by hand.)
- ``sft-grpo`` or ``sft-retry`` is recommended where there are demonstrations if it is ahead of ``retry`` on
  builtin-facts and its interval excludes 0.
- Every other arm is compared with ``grpo``, with intervals that agree with Holm's test of all of them (1979, Scand. J.
  Statist. 6, p. 65): of m arms ordered by their p-values the k-th has the confidence 1 - .05 / (m - k + 1), and from
  the first whose interval contains 0 on, none differs. (Only the first is a simultaneous interval.) The m are all arms
  that are not named above; the number of pairs shows where fewer seeds ran.

A rule decides nothing until its arms have eight seeds in common.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from toolx_kernels.compare.arms import paired_difference
from toolx_kernels.compare.figures import plain
from toolx_kernels.evaluate.intervals import CONFIDENCE, Estimate, mean_of
from toolx_kernels.evaluate.tables import estimate, markdown
from toolx_kernels.files import write_atomically

DEFAULT, BASELINE, PAPER = "retry", "grpo", "replace"
WITH_DEMONSTRATIONS = ("sft-grpo", "sft-retry")
LARGEST_LOSS = 0.03  # of held-out accuracy on builtin
PAIRS = 8  # of seeds, at least, for a rule to decide

Ends = dict[str, dict[int, float]]  # the last value of a curve, by arm and seed


def ends(runs: Iterable[Mapping], event: str, value: str) -> Ends:
    """The last ``value`` of an ``event`` in each run of ``runs.json``."""
    of_arms: Ends = {}
    for run in runs:
        arm, seed = re.fullmatch(r"(.+)-seed(\d+)", run["run"]).groups()
        of_arms.setdefault(arm, {})[int(seed)] = [each[value] for each in run["events"] if each["event"] == event][-1]
    return of_arms


def p_value(differences: Iterable[float]) -> float:
    """The p-value of the two-sided paired t test; 1 for fewer than two pairs."""
    from scipy.stats import ttest_1samp

    values = [*differences]
    if len(values) < 2:
        return 1.0
    if len(set(values)) == 1:
        return float(values[0] == 0)
    return float(ttest_1samp(values, 0.0).pvalue)


def holm(ours: Mapping[str, Mapping[int, float]], theirs: Mapping[int, float]) -> dict[str, dict]:
    """Differences of arms from one other arm, paired by seed, with intervals adjusted for the number of arms."""
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
    """Whether an interval excludes 0."""
    return difference is not None and difference.low is not None and (difference.low > 0 or difference.high < 0)


def holding(difference: Mapping, bound: float) -> bool | None:
    """Whether the interval of an accuracy lies above ``bound``; None if too few seeds have run."""
    return None if difference["pairs"] < PAIRS else difference["accuracy"].low > bound


def verdict(facts: list[dict], builtin: list[dict]) -> dict:
    """All differences that the rules use, and the decisions that follow."""
    accuracy = {"builtin-facts": ends(facts, "eval", "accuracy"), "builtin": ends(builtin, "eval", "accuracy")}
    hard = {"builtin-facts": ends(facts, "probe", "hard"), "builtin": ends(builtin, "probe", "hard")}

    def minus(task: str, arm: str, other: str) -> dict:
        of_accuracy = paired_difference(accuracy[task].get(arm, {}), accuracy[task].get(other, {}))
        of_hard = paired_difference(hard[task].get(arm, {}), hard[task].get(other, {}))
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
    holds = [holding(each, bound) for each, bound in zip(conditions, (0, 0, -LARGEST_LOSS), strict=True)]
    beside = [minus("builtin-facts", arm, DEFAULT) for arm in WITH_DEMONSTRATIONS]
    named = {BASELINE, DEFAULT, PAPER, *WITH_DEMONSTRATIONS}
    others = [arm for arm in accuracy["builtin-facts"] if arm not in named]

    def adjusted(of_arms: Ends) -> dict[str, dict]:
        return holm({arm: of_arms[arm] for arm in others}, of_arms[BASELINE])

    return {
        "default": [each | {"holds": one} for each, one in zip(conditions, holds, strict=True)],
        "default_is_retry": None if None in holds and False not in holds else all(holds),
        "with_demonstrations": beside,
        "recommended_with_demonstrations": [each["arm"] for each in beside if holding(each, 0)],
        "other_arms": {"accuracy": adjusted(accuracy["builtin-facts"]), "hard": adjusted(hard["builtin-facts"])},
    }


def page(found: Mapping) -> str:
    def row(each: Mapping) -> list[str]:
        what = f"{each['task']}: {each['arm']} minus {each['minus']}"
        return [what, str(each["pairs"]), estimate(each["accuracy"], 3, "+"), estimate(each["hard"], 1, "+")]

    head = ["difference, paired by seed", "pairs", "held-out accuracy", "hard rows"]
    rules = [[*head, "holds"]]
    said = {True: "yes", False: "no", None: "not decided yet"}
    rules += [[*row(each), said[each["holds"]]] for each in found["default"]]
    default = {True: DEFAULT, False: "as it was", None: "not decided yet"}[found["default_is_retry"]]
    beside = [head, *(row(each) for each in found["with_demonstrations"])]
    others = [["builtin-facts, minus grpo", "pairs", "held-out accuracy", "differs", "hard rows", "differs"]]
    for arm, of_accuracy in found["other_arms"]["accuracy"].items():
        of_hard = found["other_arms"]["hard"][arm]
        cells = [
            cell
            for each, digits in ((of_accuracy, 3), (of_hard, 1))
            for cell in (estimate(each["difference"], digits, "+"), said[each["differs"]])
        ]
        others.append([arm, str(of_accuracy["pairs"]), *cells])
    recommended = ", ".join(found["recommended_with_demonstrations"]) or "none"
    return "\n\n".join(
        [
            markdown(rules),
            f"Default: {default}.",
            markdown(beside),
            f"Ahead of {DEFAULT} with an interval clear of 0: {recommended}.",
            markdown(others),
            "95 % intervals of Student's t over seeds; those of the last table have the levels of Holm's test. Rules: "
            "bench/learning/verdict.py.\n",
        ]
    )


def main(folder: str) -> None:
    root = Path(folder)
    facts, builtin = (json.loads((root / task / "runs.json").read_text()) for task in ("builtin-facts", "builtin"))
    found = verdict(facts, builtin)
    write_atomically(root / "verdict.md", page(found))
    write_atomically(root / "verdict.json", json.dumps(plain(found), indent=1) + "\n")
    print(page(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
