"""The paper's first table for a model at hand: hard samples with raw prompts, with random and with better few-shots.

    python -m bench.learning.precondition precondition.json --model runs/record/cold-seed0 --config builtin

takes the settings of ``toolx train``. A sample is hard when none of ``probe_rollouts`` rollouts is correct. ``random``
shows every row demonstrations drawn once, ``better`` draws again for those still hard, up to ``demonstration_tries``
times in all; a row that can have none counts as it does raw. ``raw_as_often`` is the control of ``better``: raw prompts
given as many tries. Only where hard(raw) > hard(random) > hard(better) can replacing prompts help.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from toolx_kernels.cli import parse_train
from toolx_kernels.train.checkpoint import write_atomically
from toolx_kernels.train.data import load_eval_rows, load_rows
from toolx_kernels.train.hard_sampling import RandomDemonstrations, probe
from toolx_kernels.train.rounds import PROBE_STREAM, VERIFY_STREAM
from toolx_kernels.train.trainer import ToolExpanderTrainer


def main(output: str, *flags: str) -> None:
    with TemporaryDirectory() as nowhere:
        args = parse_train([*flags, "--output_dir", f"{nowhere}/run"])
        more = load_eval_rows(args.demonstration_dataset) if args.demonstration_dataset else ()
        trainer = ToolExpanderTrainer(args.model, None, args, *load_rows(args), demonstrations=more)
        rows, collector = trainer.rows, trainer.collector
        drawer = RandomDemonstrations(
            trainer.demonstrations, args.seed, args.few_shots_per_tool, args.max_few_shots, trainer.fitting
        )

        def hard(asked, stream: int) -> set[int]:
            return set(probe(asked, args.probe_rollouts, collector.attempt(stream, "probe")).hard)

        raw = hard([(row, ()) for row in range(len(rows))], PROBE_STREAM)
        counts, left = {"raw": len(raw)}, list(range(len(rows)))
        without = 0
        for number in range(args.demonstration_tries):
            drawn = [(row, drawer.draw(rows[row], 0, number)[0]) for row in left]
            shown = [(row, demonstrations) for row, demonstrations in drawn if demonstrations]
            still = hard(shown, VERIFY_STREAM + number)
            bare = {row for row, demonstrations in drawn if not demonstrations} & raw
            left = sorted(still | bare)
            if number == 0:
                without = len(drawn) - len(shown)
                counts["random"] = len(left)
        counts["better"] = len(left)
        again = sorted(raw)
        for number in range(1, args.demonstration_tries):
            again = sorted(hard([(row, ()) for row in again], PROBE_STREAM + number))
        counts["raw_as_often"] = len(again)
    settings = {name: getattr(args, name) for name in ("model", "dataset", "seed", "temperature", "probe_rollouts")}
    result = {"rows": len(rows), "without_demonstrations": without, "hard": counts, **settings}
    write_atomically(Path(output), json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
