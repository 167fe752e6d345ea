"""Probe cost in tokens: the probe's waves compared with an ideal sequential probe, on the same rollouts.

    python -m bench.learning.probe_cost --model runs/builtin --dataset builtin

An ideal sequential probe samples one rollout of a prompt at a time and stops at the first correct one. The probe
samples waves of 1, 3 and 6 together and cancels the unfinished ones when one is correct. Takes the settings of ``toolx
train``.
"""

from __future__ import annotations

import json
import sys
from tempfile import TemporaryDirectory

from toolx_kernels.cli.train import parse_train
from toolx_kernels.train.hard_sampling import probe
from toolx_kernels.train.rounds import PROBE_STREAM
from toolx_kernels.train.rows import load_rows
from toolx_kernels.train.trainer import ToolExpanderTrainer


def main(*flags: str) -> None:
    with TemporaryDirectory() as nowhere:
        args = parse_train([*flags, "--output_dir", f"{nowhere}/run"])
        trainer = ToolExpanderTrainer(args.model, None, args, *load_rows(args))
    rows, collector = trainer.task.rows, trainer.collector
    asked = [(row, ()) for row in range(len(rows))]
    found = probe(asked, args.probe_rollouts, collector.attempt(PROBE_STREAM, "probe"))
    waves = collector.tokens["probe"]

    prompts = [trainer.task.prompts.ids(row) for row in rows]
    whole = trainer.rollouter.roll_out(
        rows, prompts, args.probe_rollouts, collector.params, row_ids=range(len(rows)), step=PROBE_STREAM
    )
    sequential, hard = 0, []
    for place, rollouts in enumerate(whole):
        right = [trainer.task.judge(rollout.answer_text, rows[place]) for rollout in rollouts]
        until = right.index(True) + 1 if any(right) else len(right)
        sequential += sum(rollout.written for rollout in rollouts[:until])
        hard += [] if any(right) else [place]
    everything = sum(rollout.written for rollouts in whole for rollout in rollouts)
    print(
        json.dumps(
            {
                "model": args.model,
                "rows": len(rows),
                "hard": len(found.hard),
                "classified_alike": sorted(found.hard) == hard,
                "tokens": {"all rollouts": everything, "waves": waves, "sequential": sequential},
                "waves / sequential": round(waves / sequential, 3),
                "waves / all": round(waves / everything, 3),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
