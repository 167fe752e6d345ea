"""The learning records: every arm from the same cold start, at an equal budget of tokens.

    python -m bench.learning.run builtin runs/record
    python -m bench.learning.run builtin runs/record --other-decay
    python -m bench.learning.run builtin-facts runs/facts --seeds 3 --arms grpo retry replace-better
    python -m bench.learning.seal_rows seal-tools-train.jsonl runs/smollm2/data
    python -m bench.learning.run smollm2 runs/smollm2 --seeds 2 --workers 1

Each run is a process of its own. One that was stopped goes on from its last checkpoint and one that is finished is left
alone, so the same command goes on with an interrupted record. ``toolx compare`` puts the results side by side.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"

REMEDIES = (
    "grpo", "replace", "replace-better", "add", "distill", "distill-successes", "retry", "retry-shown",
    "retry-successes", "retry-hint", "routed", "imitate", "zero-variance", "max-variance", "similarity", "dapo", "sft",
    "sft-grpo", "sft-retry",
)  # fmt: skip


@dataclass(frozen=True)
class Record:
    """base      recipes that come before the arm's
    seeds     of the arms
    own_cold  each seed has a cold start of its own; otherwise seed 0's serves all
    arms      recipes in toolx_kernels/configs, each with settings that only it has
    """

    base: tuple[str, ...]
    seeds: int
    own_cold: bool
    arms: dict[str, dict]


RECORDS = {
    # four examples of one's own take room
    "builtin": Record(
        ("builtin",),
        8,
        True,
        {"grpo": {}, "replace": {}, "add": {}, "distill": {}, "self-exemplify": {"max_completion_length": 320}},
    ),
    "builtin-facts": Record(("builtin-facts",), 8, True, dict.fromkeys(REMEDIES, {})),
    "smollm2": Record((), 2, False, {"grpo": {}, "replace": {}, "distill": {}}),
}
WITHOUT_DECAY = ("grpo",)  # the recipes of all others have 0.8 a round


def train(folder: Path, settings: dict, configs: list[str], threads: int) -> None:
    """One run, finished when this returns; raises when it fails."""
    if (folder / "summary.json").exists():
        return
    flags = [f"--{name}={value}" for name, value in settings.items()]
    if (folder / "config.yaml").exists():
        flags.append("--resume")
    command = [sys.executable, "-m", "toolx_kernels.cli", "train", "--output_dir", str(folder), *flags]
    folder.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    with open(folder.with_suffix(".log"), "a") as log:
        subprocess.run(
            [*command, "--config", *configs], stdout=log, stderr=subprocess.STDOUT, env=environment, check=True
        )
    print(folder, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", choices=RECORDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, help="of the arms")
    parser.add_argument("--arms", nargs="+")
    parser.add_argument("--other-decay", action="store_true", help="0.8 a round where the recipe has none, else none")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time")
    args = parser.parse_args()
    record = RECORDS[args.record]
    seeds, threads = range(args.seeds or record.seeds), max(1, os.cpu_count() // args.workers)
    data = {}
    if args.record == "smollm2":
        data["eval_dataset"] = args.folder / "data" / "bfcl.jsonl"
        data["demonstration_dataset"] = args.folder / "data" / "demonstrations.jsonl"

    def cold_start(seed: int) -> None:
        settings = {"seed": seed, **data}
        if data:
            settings["dataset"] = args.folder / "data" / "cold.jsonl"
        configs = [*record.base, str(CONFIGS / f"{args.record}-cold.yaml")]
        train(args.folder / f"cold-seed{seed}", settings, configs, threads)

    def arm(seed: int, name: str) -> None:
        cold = seed if record.own_cold else 0
        settings = {"seed": seed, "model": args.folder / f"cold-seed{cold}", **data, **record.arms[name]}
        if data:
            settings["dataset"] = args.folder / "data" / "rl.jsonl"
        folder = args.folder / f"{name}-seed{seed}"
        if args.other_decay:
            settings["lr_decay"] = 0.8 if name in WITHOUT_DECAY else 1.0
            folder = args.folder / f"{name}-{'with' if name in WITHOUT_DECAY else 'without'}-decay-seed{seed}"
        train(folder, settings, [*record.base, name, str(CONFIGS / f"{args.record}-arm.yaml")], threads)

    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(cold_start, seeds if record.own_cold else [0]))
        jobs = [(seed, name) for seed in seeds for name in args.arms or record.arms]
        list(pool.map(lambda job: arm(*job), jobs))


if __name__ == "__main__":
    main()
