"""The paper's first table for a model at hand: hard samples with raw prompts, with random and with better few-shots.

    python -m bench.learning.precondition precondition.json --model runs/record/cold-seed0 --config builtin

takes the settings of ``toolx train``. A sample is hard when none of ``probe_rollouts`` rollouts is correct. Each count
is a probe of all rows with rollouts of its own: of raw prompts, with demonstrations drawn once (``random``), with those
that training would choose (``better``: drawn until they make the model answer correctly within ``verify_rollouts``
rollouts, at most ``demonstration_tries`` times). A row that gets none is probed raw. Only where hard(raw) >
hard(random) > hard(better) does replacing prompts help as in the paper.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from toolx_kernels.cli.train import parse_train
from toolx_kernels.files import write_atomically
from toolx_kernels.train.hard_sampling import Demonstrations, HardSamples, probe
from toolx_kernels.train.policies.demonstrators import RandomDemonstrations, VerifiedDemonstrations
from toolx_kernels.train.rounds import PROBE_STREAM
from toolx_kernels.train.rows import load_demonstrations, load_rows
from toolx_kernels.train.trainer import ToolExpanderTrainer
from toolx_kernels.train.verification import VERIFY_STREAM


def main(output: str, *flags: str) -> None:
    with TemporaryDirectory() as nowhere:
        args = parse_train([*flags, "--output_dir", f"{nowhere}/run"])
        more = load_demonstrations(args.demonstration_dataset)
        trainer = ToolExpanderTrainer(args.model, None, args, *load_rows(args), demonstrations=more)
        rows, collector = trainer.task.rows, trainer.collector
        drawer = RandomDemonstrations.of(args, trainer.task.demonstrations, trainer.task.prompts)

        def hard(shown: list[Demonstrations], stream: int) -> int:
            asked = list(enumerate(shown))
            return len(probe(asked, args.probe_rollouts, collector.attempt(stream, "probe")).hard)

        drawn = [drawer.draw(row, 0, 0)[0] for row in rows]
        table, everything = HardSamples(rows, more), range(len(rows))
        tries, rollouts = args.demonstration_tries, args.verify_rollouts
        chooser = VerifiedDemonstrations(
            drawer, tries, rollouts, lambda number: collector.attempt(VERIFY_STREAM + number, "verify")
        )
        chooser.choose(table, everything, 0)
        chosen = [table.demonstrations(row) for row in everything]
        counts = {
            name: hard(shown, PROBE_STREAM + place)
            for place, (name, shown) in enumerate({"raw": [()] * len(rows), "random": drawn, "better": chosen}.items())
        }
    without = {"random": sum(not shown for shown in drawn), "better": sum(not shown for shown in chosen)}
    settings = {name: getattr(args, name) for name in ("model", "dataset", "seed", "temperature", "probe_rollouts")}
    result = {"rows": len(rows), "hard": counts, "without_demonstrations": without, **settings}
    write_atomically(Path(output), json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
