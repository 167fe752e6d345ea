"""The learning record of the built-in task: every arm from the same cold start, per seed, at an equal budget of tokens.

    python -m bench.learning.run runs/record --seeds 8 --workers 2

Runs are started in the order of seeds, each in a process of its own with one thread; one that was stopped goes on from
its last checkpoint, and one that is finished is left alone, so the same command goes on with an interrupted record.
``toolx compare`` puts the results side by side.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"
ARMS = ("grpo", "replace", "add", "distill", "self-exemplify")
# The decay is the recipe's (none for grpo, 0.8 for the others), and the other way round under another name.
OTHER_DECAY = {arm: 0.8 if arm == "grpo" else 1.0 for arm in ARMS}
OWN_SETTINGS = {"self-exemplify": {"max_completion_length": 320}}  # four examples take room


def train(folder: Path, settings: dict, configs: list[str]) -> None:
    """One run, finished when this returns; raises when it fails."""
    if (folder / "summary.json").exists():
        return
    flags = [f"--{name}={value}" for name, value in settings.items()]
    if (folder / "config.yaml").exists():
        flags.append("--resume")
    command = [sys.executable, "-m", "toolx_kernels.cli", "train", "--output_dir", str(folder), *flags]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".log"), "a") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        command += ["--config", *configs]
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=True)
    print(folder, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--other-decay", action="store_true", help="the arms with the decay that is not their recipe's")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()

    def cold_start(seed: int) -> None:
        train(args.folder / f"cold-seed{seed}", {"seed": seed}, ["builtin", str(CONFIGS / "builtin-cold.yaml")])

    def arm(seed: int, name: str) -> None:
        settings = {"seed": seed, "model": args.folder / f"cold-seed{seed}"} | OWN_SETTINGS.get(name, {})
        folder = args.folder / f"{name}-seed{seed}"
        if args.other_decay:
            settings["lr_decay"] = OTHER_DECAY[name]
            folder = args.folder / f"{name}-decay{settings['lr_decay']:.1f}-seed{seed}".replace(".", "")
        train(folder, settings, ["builtin", name, str(CONFIGS / "builtin-arm.yaml")])

    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(cold_start, range(args.seeds)))
        list(pool.map(arm, *zip(*[(seed, name) for seed in range(args.seeds) for name in args.arms], strict=True)))


if __name__ == "__main__":
    main()
