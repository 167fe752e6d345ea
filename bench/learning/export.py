"""Export of a record's runs to one file: settings, summary, evaluations and hard samples per round of each run.

    python -m bench.learning.export bench/results/learning/builtin/runs.json runs/record/*-seed*

Paths of the machine are left out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from toolx_kernels.files import write_atomically
from toolx_kernels.train.run.folder import RunFolder

PATHS = ("checkpoint", "output_dir", "model", "dataset", "eval_dataset", "demonstration_dataset")


def exported(folder: Path) -> dict:
    run = RunFolder(folder)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    events = [event for event in run.metrics() if event["event"] in ("eval", "probe")]
    return {
        "run": folder.name,
        "config": {name: value for name, value in run.config().items() if name not in PATHS},
        "summary": {name: value for name, value in summary.items() if name not in PATHS},
        "events": [{name: value for name, value in event.items() if name != "timing"} for event in events],
    }


def main(output: str, *folders: str) -> None:
    runs = [exported(Path(folder)) for folder in folders if (Path(folder) / "summary.json").exists()]
    write_atomically(Path(output), "[\n" + ",\n".join(json.dumps(run) for run in runs) + "\n]\n")
    print(f"{output}: {len(runs)} runs")


if __name__ == "__main__":
    main(*sys.argv[1:])
