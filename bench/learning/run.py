"""Runs of the learning records: every arm from the same cold start, at an equal budget.

    python -m bench.learning.run builtin-facts runs/facts
    python -m bench.learning.run builtin-facts runs/facts --arms dapo routed
    python -m bench.learning.run builtin runs/builtin --seeds 4 5 --arms grpo retry
    python -m bench.learning.real_rows smollm2 runs/smollm2/data seal-tools-train.jsonl
    python -m bench.learning.run smollm2 runs/smollm2 --workers 1
    python -m bench.learning.real_rows coder runs/coder/data xlam-star.jsonl seal-tools-train.jsonl
    python -m bench.learning.run coder runs/coder --model coder.gguf --workers 1 --turn 2

Each run is a separate process. A stopped run resumes from its last checkpoint and a finished run is left alone, so the
same command resumes an interrupted record. ``toolx compare`` compares the results; ``bench.learning.measure`` measures
the models of smollm2 and coder before and after.

On builtin-facts ``bench.learning.precondition`` checks each cold start before any arm runs: the arms get the first
seeds that pass it. Seeds and budgets were fixed before the first arm ran. They were sized on runs of seed 0, from which
the record takes only the random weights with which all its cold starts begin.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.common.arguments import SEED, WORKERS, number
from toolx_kernels.cli.recipes import read_recipe

CONFIGS = Path(__file__).parent / "configs"
POLL_SECONDS = 1.0

NAMED = ("grpo", "retry", "replace", "sft-retry", "sft-grpo", "retry-successes", "replace-better", "imitate")


@dataclass(frozen=True)
class Record:
    """The settings of a record.

    base          recipes that come before the arm's
    seeds         of the arms; with a precondition, the first that pass it, from ``seeds[0]`` on
    own_cold      each seed has its own cold start; otherwise all use seed 0's
    arms          recipes in toolx_kernels/configs
    precondition  whether ``bench.learning.precondition`` decides which cold starts arms begin from
    cold          whether there are cold starts; otherwise arms begin from --model
    real          the rows are those of ``bench.learning.real_rows``, in the record's folder
    """

    base: tuple[str, ...]
    seeds: tuple[int, ...]
    own_cold: bool
    arms: tuple[str, ...]
    precondition: bool = False
    cold: bool = True
    real: bool = False


RECORDS = {
    "builtin-facts": Record(("builtin-facts",), tuple(range(4, 12)), True, NAMED, precondition=True),
    # the seeds whose cold starts passed the precondition of builtin-facts
    "builtin": Record(("builtin",), (4, 5, 7, 8, 11, 12, 14, 15), True, ("grpo", "retry", "replace", "sft-retry")),
    "smollm2": Record((), (0,), False, ("grpo", "retry"), real=True),
    "coder": Record((), (0,), False, ("grpo", "retry"), cold=False, real=True),
}


def train(folder: Path, settings: dict, configs: list[str], threads: int, turn: int | None = None) -> bool:
    """Runs or resumes one run, for ``turn`` steps if given; returns whether it is finished. Raises if it fails."""
    if (folder / "summary.json").exists():
        return True
    flags = [f"--{name}={value}" for name, value in settings.items()]
    if (folder / "config.yaml").exists():
        flags.append("--resume")
    command = [sys.executable, "-m", "toolx_kernels.cli", "train", "--output_dir", str(folder), *flags]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".log"), "a") as log:
        command += ["--config", *configs]
        run = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment(threads))
        enough, told = saved_steps(folder) + (turn or 0), False
        while run.poll() is None:
            if turn and not told and saved_steps(folder) >= enough:
                run.terminate()  # it finishes the current step and saves it
                told = True
            time.sleep(POLL_SECONDS)
    if told and run.returncode == 128 + signal.SIGTERM:
        return False
    if run.returncode:
        raise subprocess.CalledProcessError(run.returncode, command)
    print(folder, flush=True)
    return True


def saved_steps(folder: Path) -> int:
    return max((int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*")), default=0)


def environment(threads: int) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}


def fit(cold: Path, seed: int, base: Sequence[str], arms: Path, threads: int) -> bool:
    """Whether a cold start passes the precondition, for the budget in the config of all ``arms``; measures it if that
    was not done yet."""
    output = cold.with_name(f"precondition-seed{seed}.json")
    if not output.exists():
        command = [sys.executable, "-m", "bench.learning.precondition", output]
        settings = ["--budget", read_recipe(str(arms)).settings["max_fe"], "--model", cold, "--seed", seed]
        settings += ["--config", *base, "retry"]
        with open(output.with_suffix(".log"), "w") as log:
            subprocess.run(
                [str(word) for word in (*command, *settings)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(threads),
                check=True,
            )
    passes = json.loads(output.read_text())["passes"]
    print(output, "passes" if passes else "fails", flush=True)
    return passes


def first_fit(seeds: Sequence[int], cold_start: Callable[[int], bool], pool: ThreadPoolExecutor) -> list[int]:
    """As many seeds as requested: those that fit, and for each that does not, the next one after all of them."""
    chosen, asked = [], list(seeds)
    while asked:
        fits = list(pool.map(cold_start, asked))
        chosen += [seed for seed, one in zip(asked, fits, strict=True) if one]
        asked = list(range(asked[-1] + 1, asked[-1] + 1 + fits.count(False)))
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", choices=RECORDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=SEED, nargs="+", help="seeds of the arms (default: the record's)")
    parser.add_argument("--arms", nargs="+", help="any recipes of toolx train (default: the record's)")
    parser.add_argument(
        "--workers", type=WORKERS, default=os.cpu_count(), help="runs at a time (default: one per core)"
    )
    parser.add_argument("--model", help="the model from which arms begin, for a record without a cold start")
    parser.add_argument(
        "--turn", type=number(int, 1, 10**9), help="saved steps after which a run yields to the next one"
    )
    args = parser.parse_args()
    record, shared = RECORDS[args.record], CONFIGS / f"{args.record}-arm.yaml"
    seeds, threads = args.seeds or record.seeds, max(1, os.cpu_count() // args.workers)
    if bool(args.model) is record.cold:
        parser.error(f"{args.record} {'has cold starts and takes no' if record.cold else 'needs a'} --model")
    data = {}
    if record.real:  # a run must evaluate at its end; bench.learning.measure does it on all rows
        data = {"eval_dataset": args.folder / "data" / "bfcl.jsonl", "eval_rows": 1}
        data["demonstration_dataset"] = args.folder / "data" / "demonstrations.jsonl"

    def cold_start(seed: int) -> bool:
        """Trains it; returns whether arms may begin from it."""
        settings = {"seed": seed, **data}
        if data:
            settings["dataset"] = args.folder / "data" / "cold.jsonl"
        folder = args.folder / f"cold-seed{seed}"
        train(folder, settings, [*record.base, str(CONFIGS / f"{args.record}-cold.yaml")], threads)
        return not record.precondition or fit(folder, seed, record.base, shared, threads)

    def arm(seed: int, name: str) -> bool:
        cold = args.folder / f"cold-seed{seed if record.own_cold else 0}"
        settings = {"seed": seed, "model": cold if record.cold else args.model, **data}
        if data:
            settings["dataset"] = args.folder / "data" / "rl.jsonl"
        configs = [*record.base, name, str(shared)]
        return train(args.folder / f"{name}-seed{seed}", settings, configs, threads, args.turn)

    with ThreadPoolExecutor(args.workers) as pool:
        if record.own_cold:
            seeds = first_fit(seeds, cold_start, pool)
        elif record.cold:
            cold_start(0)
        jobs = [(seed, name) for name in args.arms or record.arms for seed in seeds]
        while jobs:
            finished = list(pool.map(lambda job: arm(*job), jobs))
            jobs = [job for job, done in zip(jobs, finished, strict=True) if not done]


if __name__ == "__main__":
    main()
