"""Random killing of a small run: it is resumed after each kill and must end like an undisturbed run.

    python -m tests.train.run.killing --kills 200 --seed 0

One process imports everything and forks each run. A run is killed by the clock, before one of its file operations
(open, rename, removal, sync, ...) or in the middle of a write. This repeats until ``--kills`` kills are done.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from contextlib import redirect_stdout
from pathlib import Path

SETTINGS = dict(
    hard_sampling="add",
    num_train_epochs=2,
    prompts_per_step=4,
    num_generations=3,
    max_completion_length=6,
    probe_rollouts=2,
    cold_start_steps=1,
    save_steps=2,
    eval_steps=3,
    lr_decay_per="step",
    save_total_limit=2,
)
OPERATIONS = {
    "open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.listdir", "shutil.rmtree",
}  # fmt: skip
KINDS = ("operation", "torn", "clock", "operation")  # used in turn


def outcome(run: Path) -> dict:
    """Everything a run leaves, except what depends on the machine or on the number of interruptions."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    found = {
        "names": sorted(path.name for path in run.iterdir()),
        "metrics": [{key: value for key, value in line.items() if key != "timing"} for line in metrics],
        "rollouts": (run / "rollouts.jsonl").read_bytes(),
        "hard_samples": (run / "hard_samples.jsonl").read_bytes(),
    }
    for checkpoint in run.glob("checkpoint-*"):
        record = json.loads((checkpoint / "state.json").read_text())
        del record["crc"]
        for of_machine in ("wall_seconds", "phases", "peaks"):
            del record["state"]["reporter"][of_machine]
        marks = record["state"]["reporter"]["marks"]
        marks["metrics.jsonl"] = marks["metrics.jsonl"][0]  # their lines, whose CRC covers the timing
        record["state"]["settings"] = None
        found[checkpoint.name] = record  # includes the checksums of weights and optimizer
    return found


class Killer:
    """Counts file operations in a folder and kills this process before operation number ``victim``."""

    def __init__(self, folder: Path):
        self.folder, self.count, self.victim = str(folder), 0, None
        fsync = os.fsync

        def counted_fsync(descriptor):
            self.operation("os.fsync", "")
            fsync(descriptor)

        os.fsync = counted_fsync
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple) -> None:
        if event in OPERATIONS and str(arguments[0]).startswith(self.folder):
            self.operation(event, Path(str(arguments[0])).name)

    def operation(self, event: str, name: str) -> None:
        self.count += 1
        if self.count == self.victim:
            die(f"before {event} {name}, its file operation {self.count}")


last_words = -1  # file descriptor to which a child writes what kills it


def die(how: str) -> None:
    os.write(last_words, how.encode())
    os.kill(os.getpid(), signal.SIGKILL)


def tear(rng: random.Random) -> None:
    """Makes this process end with a half-written log line or a half-written optimizer state."""
    from toolx_kernels.train.run import checkpoint
    from toolx_kernels.train.run.folder import RunFolder

    left = rng.randrange(1, 12)

    def append(self, name, record):
        nonlocal left
        left -= 1
        line = json.dumps(record, ensure_ascii=False) + "\n"
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write(line if left else line[: len(line) // 2])
        if not left:
            die(f"within a line of {name}")

    def save(tensors, path):
        save_file(tensors, path)
        os.truncate(path, path.stat().st_size // 2)
        die(f"within {path.parent.name}/{path.name}")

    save_file = checkpoint.save_file
    if rng.random() < 0.6:
        RunFolder._append = append
    else:
        checkpoint.save_file = save


def train(run: Path) -> None:
    from tests.train.test_trainer import make_trainer

    make_trainer(run, **SETTINGS, resume=(run / "config.yaml").exists()).train()


def forked(run: Path, killer: Killer, kind: str, rng: random.Random, most: int, seconds: float) -> str | None:
    """Starts or resumes the run in a child process; returns how it was killed, or None if it finished."""
    global last_words
    reader, writer = os.pipe()
    victim, delay = rng.randint(1, most), rng.uniform(0, seconds)
    log = run.parent / "log.txt"
    child = os.fork()
    if not child:
        try:
            os.close(reader)
            last_words = writer
            said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            killer.count, killer.victim = 0, victim if kind == "operation" else None
            if kind == "torn":
                tear(rng)
            train(run)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writer)
    if kind == "clock":
        ends = time.monotonic() + delay
        while time.monotonic() < ends and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    words = os.read(reader, 1000).decode()
    os.close(reader)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return words or f"after {delay:.2f} s"
    if status:
        raise AssertionError(f"the run failed:\n{log.read_text()}")
    return None


def campaign(folder: Path, kills: int, seed: int) -> int:
    """Returns how many runs were killed, resumed and compared; raises AssertionError if one differs."""
    import torch
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # a fork would lose its thread
    torch.set_num_threads(1)
    killer, rng = Killer(folder), random.Random(f"kills {seed}")
    started = time.process_time()
    with redirect_stdout(sys.stderr):
        train(folder / "undisturbed")  # in this process, so that late imports happen once
    seconds, most = time.process_time() - started, killer.count
    expected = outcome(folder / "undisturbed")
    print(f"undisturbed: {most} file operations and {seconds:.1f} s of one core", flush=True)
    run, done, compared = folder / "run", 0, 0
    while done < kills or run.exists():
        kind = KINDS[done % len(KINDS)] if done < kills else "none"
        how = forked(run, killer, kind, rng, most, seconds)
        if how:
            done += 1
            there = sorted(path.name for path in run.glob("*checkpoint-*"))
            print(f"kill {done} of {kills}: {how}; there are {', '.join(there) or 'no checkpoints'}", flush=True)
        else:
            found = outcome(run)
            for name in sorted({*expected, *found}):
                assert found.get(name) == expected.get(name), f"{name} is not as in the undisturbed run; see {run}"
            shutil.rmtree(run)
            compared += 1
            print(f"run {compared} is as the undisturbed one, to the bit", flush=True)
    return compared


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # CUDA does not survive a fork
    parser = argparse.ArgumentParser(prog="python -m tests.train.run.killing", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = campaign(Path(scratch), asked.kills, asked.seed)
    print(f"{asked.kills} kills, {runs} runs resumed to the end: all as the undisturbed one.")
