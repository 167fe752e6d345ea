"""Cases for the tests of compare: run folders written by hand, and arms of them."""

import json

import yaml

from toolx_kernels.compare.arms import arms_of
from toolx_kernels.compare.runs import read_run


def write_run(
    folder,
    seed=0,
    accuracies=(0.1, 0.3, 0.5),
    hard=(40, 30, 20),
    relapsed=None,
    tiers=None,
    finished=True,
    spent=True,
    fe=True,
    seconds=60.0,
    probes="each",
    round_steps=10,
    **config,
):
    """Writes a run with an evaluation and a probe every 10 steps.

    A step spends 1,000 tokens, 600 of them sampled, and 3,000 FE. ``tiers`` gives the accuracies of each tier by name,
    ``relapsed`` the counts of the probes. ``spent``, ``fe`` and ``seconds`` say whether the run records that figure.
    ``probes`` happen "each" time, at both "ends" or never ("none").
    """
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": seed, "output_dir": str(folder), **config}))

    def so_far(step):
        return ({"spent_tokens": 1000 * step} if spent else {}) | ({"spent_fe": 3000 * step} if fe else {})

    lines = [{"event": "cold_start", "step": 800, "loss": 1.0}]
    for i, (accuracy, count) in enumerate(zip(accuracies, hard, strict=True)):
        end = 10 * i
        for step in range(max(1, end - 9), end + 1):
            line = {"event": "step", "step": step, "round": (step - 1) // round_steps, "tokens": 600 * step}
            lines.append(line | so_far(step))
        parts = {name: values[i] for name, values in (tiers or {}).items()}
        lines.append({"event": "eval", "step": end, "accuracy": accuracy, "parts": parts} | so_far(end))
        if probes == "each" or (probes == "ends" and i in (0, len(hard) - 1)):
            line = {"event": "probe", "step": end, "round": i, "rows": 50, "hard": count}
            lines.append(line | ({} if relapsed is None else {"relapsed": relapsed[i]}) | so_far(end))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        summary = {"eval_rows": config.get("eval_rows") or 480} | ({"wall_seconds": seconds} if seconds else {})
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def runs_of(tmp_path, *specs):
    return [read_run(write_run(tmp_path / name, **settings)) for name, settings in specs]


def two_arms(tmp_path):
    """Two arms with three finished seeds each; ours has an unfinished fourth.

    Base ends with accuracies .5 .6 .7 and 20 22 24 hard rows; ours ends .1 .2 .3 above and 5 7 9 rows below. By tier,
    ours ends .3 .4 .5 above on easy, and .1 below on office, on which only two seeds of base were measured. Base
    forgets 6 7 8 rows, ours 5 5 5.
    """

    def spec(arm, seed, end, hard, relapsed, tiers):
        accuracies, settings = (0.1, 0.2, end), dict(hard=(40, *hard), relapsed=relapsed, tiers=tiers)
        return f"{arm}-seed{seed}", dict(seed=seed, arm=("base", "ours").index(arm), accuracies=accuracies, **settings)

    base = [
        spec(
            "base",
            i,
            end,
            (30, left),
            (0, 4, 2 + i),
            {"easy": (0.2, 0.3, 0.4)} | ({"office": (0.0, 0.1, 0.3)} if i else {}),
        )
        for i, end, left in ((0, 0.5, 20), (1, 0.6, 22), (2, 0.7, 24))
    ]
    ours = [
        spec("ours", i, end, (35, 15), (0, 2, 3), {"easy": (0.2, 0.3, 0.7 + i / 10), "office": (0.0, 0.1, 0.2)})
        for i, end in ((2, 1.0), (1, 0.8), (0, 0.6))
    ]
    late = [("ours-seed9", dict(seed=9, arm=1, accuracies=(0.3, 0.4), hard=(40, 1), finished=False))]
    return arms_of(runs_of(tmp_path, *base, *ours, *late))
