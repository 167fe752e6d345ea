"""GPU version of the SmolLM2 record, in minutes: gates first, then pairs of arms, several processes at a time.

    python -m bench.learning.real_rows smollm2 bundle seal-tools-train.jsonl # before: what to copy to the GPU
    python -m bench.learning.gpu /dev/shm/record --bundle bundle             # there; OUT=folder is for the results
    python -m bench.learning.gpu runs/toy --toy --device cpu --minutes 3     # all of it at toy size, on any machine

A bundle holds rows, and optionally a cold start in ``cold/`` (the model files of its checkpoint); without one, the cold
start is trained first. Nothing is installed or downloaded: packages and the model of ``smollm2-cold.yaml`` must be
there. Additional flags of ``toolx train`` apply to all arms.

gates    The model loads, on the GPU and in its dtype; demonstrations fit the context, and two runs the memory; a
         training step has a finite loss, a gradient and the sampler's log-probs; a greedy answer has only calls; with
         demonstrations at least 15 % fewer rows are hard. The first gate that fails ends the record.
pairs    ``grpo`` and ``retry`` with one seed, in parallel and from the same cold start; as many at a time as memory,
         cores and ``--at-once`` allow. A pair starts only if the time of the longest pair so far is left. Runs that are
         unfinished at the end are stopped and stay in the folder as they are.
results  Of complete pairs only, rewritten after each: ``runs.json``, ``comparison.md`` with paired differences,
         ``.json`` and ``.png``. ``facts.jsonl`` has machine, versions, gates and all pairs with their times, each
         written at once.

The same command resumes an interrupted record: it keeps finished runs, and checks the gates again.

The size, in ``smollm2-gpu.yaml``, is estimated and not measured. A decode step of 6.5 ms and an update of 0.3 s (from
5.7 ms and 0.36 s of a 0.5B shape on an H200) make 32 s for a run of grpo and 41 s for one of retry, plus 40 s to start
each; gates take 80 s and the cold start 50. Without NVIDIA's MPS, which this does not start, decode steps of several
processes take turns, 22 and 31 s of a run: hence two pairs at a time, and about four in eight minutes.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.common.arguments import MINUTES, SEED, WORKERS
from bench.gpu.__main__ import without_paths
from bench.gpu.commands import exit_status
from bench.gpu.machine import machine
from bench.gpu.runner import ROOT, Bench, Command, Fact, Job, Journal, commit, find_all, last_line, read_journal
from bench.learning import export
from bench.learning.precondition import LEAST_FEWER_HARD
from toolx_kernels.cli.train import parse_train
from toolx_kernels.compare.arms import Arm, arms_of
from toolx_kernels.compare.report import describe, write_comparison
from toolx_kernels.compare.runs import read_run
from toolx_kernels.engine.pool_size import device_memory
from toolx_kernels.errors import InputError
from toolx_kernels.models.load import resolve_device
from toolx_kernels.toolcall.parse import read
from toolx_kernels.train.hard_sampling import probe
from toolx_kernels.train.memory.plan import GIB
from toolx_kernels.train.memory.planner import plan_of
from toolx_kernels.train.memory.workload import Workload
from toolx_kernels.train.policies.demonstrators import RandomDemonstrations
from toolx_kernels.train.rounds import PROBE_STREAM
from toolx_kernels.train.rows import load_demonstrations, load_rows
from toolx_kernels.train.trainer import ToolExpanderTrainer

CONFIGS = Path(__file__).parent / "configs"
COLD, ARMS = "cold", ("grpo", "retry")  # differences are to the first arm
SAMPLED, ANSWERED = 96, 16  # rows for the precondition, and rows for greedy answers
# Largest difference of log-probs between sampler and learner: of any token in fp32, as in tests/train; on average in
# bfloat16 (160 tokens of SmolLM2 on a CPU: 0.031, and one of them 0.30).
TOLERANCE = {"float32": ("logp_difference", 1e-4), "bfloat16": ("logp_difference_mean", 0.1)}
MEMORY_SHARE = 0.9  # of the device, for all runs together
CORES = 2  # per run
LAST_SECONDS = 8  # for stopping runs and printing tables; results are on the disk before


@dataclass(frozen=True, slots=True)
class Record:
    """The folders of runs and their flags for ``toolx train``; ``more`` are flags of all arms."""

    folder: Path
    bundle: Path | None  # None: at toy size
    device: str
    more: Sequence[str] = ()
    seeds: Sequence[int] = range(8)
    at_once: int = 2  # most pairs at a time

    @property
    def cold(self) -> Path:
        """The cold start: the bundle's, or the run that trains it."""
        return own if self.bundle and (own := self.bundle / COLD).is_dir() else self.run(COLD, 0)

    def run(self, name: str, seed: int) -> Path:
        return self.folder / f"{name}-seed{seed}"

    def finished(self, name: str, seed: int) -> bool:
        return (self.run(name, seed) / "summary.json").exists()

    def flags(self, name: str, seed: int, **settings: object) -> list[str]:
        """The flags of an arm or of the cold start."""
        cold, task = name == COLD, "smollm2" if self.bundle else "builtin-facts"
        told = {"seed": seed, "device": self.device, "output_dir": self.run(name, seed)}
        told |= {} if cold else {"model": self.cold}
        configs = [f"{task}-cold.yaml"] if cold else [name, f"{task}-arm.yaml"]
        if self.bundle:
            rows = {
                "dataset": COLD if cold else "rl",
                "demonstration_dataset": "demonstrations",
                "eval_dataset": "bfcl",
            }
            told |= {setting: self.bundle / f"{file}.jsonl" for setting, file in rows.items()}
            configs = [*configs, "smollm2-gpu.yaml"]
        else:
            configs = ["builtin-facts", "gpu-toy.yaml", *configs]
        flags = [f"--{setting}={value}" for setting, value in (told | settings).items()]
        configs = [str(CONFIGS / config) if config.endswith(".yaml") else config for config in configs]
        return [*flags, *([] if cold else self.more), "--config", *configs]

    def command(self, name: str, seed: int, threads: int, seconds: float = 0.0) -> Command:
        """The command of a run, which resumes a run that was started."""
        again = ["--resume"] if (self.run(name, seed) / "config.yaml").exists() else []
        train = [sys.executable, "-m", "toolx_kernels.cli", "train", *again, *self.flags(name, seed)]
        env = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
        return Command(f"{name}-seed{seed}", seconds, train, exit_status, env=env)


class Gates:
    """Checks of a model; ``processes`` is the number of runs that fit the memory."""

    def __init__(self, record: Record, model: str | Path, folder: Path, reward: Callable | None = None):
        self.args = parse_train(record.flags(ARMS[-1], 0, model=model, output_dir=folder))
        self.reward, self.processes = reward, 0
        self.demands = record.bundle is not None  # a cold start at toy size learns nothing

    def model(self, bench: Bench) -> dict:
        args = replace(self.args, beta=0.0)  # only a run makes the reference model of a KL
        rows, more = load_rows(args), load_demonstrations(args)
        self.trainer = ToolExpanderTrainer(args.model, self.reward, args, *rows, demonstrations=more)
        self.task, weights = self.trainer.task, self.trainer.model
        drawer = RandomDemonstrations.of(args, self.task.demonstrations, self.task.prompts)
        self.drawn = [drawer.draw(row, 0, 0) for row in self.task.rows]
        wanted, found = f"{bench.device.type} torch.{args.dtype}", f"{weights.device.type} {weights.dtype}"
        failures = [] if wanted == found else [f"it is {found}, not {wanted}"]
        return {"weights": found, "parameters": weights.num_parameters(), "failures": failures}

    def room(self, bench: Bench) -> dict:
        """Checks the room of the context for demonstrations, and of the memory for runs."""
        args, task, model = self.args, self.task, self.trainer.model
        cut = sum(left_out for _, left_out in self.drawn)
        failures = [f"{cut} demonstrations do not fit the context of {task.prompts.context} tokens"] if cut else []
        work = Workload.of(args, task.prompts, task.demonstrations, task.rows, task.eval_rows)
        memory = device_memory(model.device)
        plan = plan_of(model.config, args, device=bench.device.type, memory=memory, workload=work)
        self.processes = int(MEMORY_SHARE * memory / plan.needed)
        if self.processes < len(ARMS):
            failures.append(f"a run needs {plan.needed / GIB:.1f} GiB, and a pair does not fit {memory / GIB:.1f}")
        return {"planned_gib": plan.needed / GIB, "processes": self.processes, "failures": failures}

    def step(self, bench: Bench) -> dict:
        """Takes a training step on groups in which half of the rollouts earn 1; it compiles all that a run needs."""
        self.trainer.run.start(self.args)
        told = self.trainer.step()  # raises if loss or gradient is not finite
        names = ("loss", "grad_norm", "logp_difference", "logp_difference_mean")
        found = {name: told.get(name, math.nan) for name in names} | {"step_s": told["timing"]["seconds"]}
        (name, most), failures = TOLERANCE[self.args.dtype], []
        if not found["grad_norm"] > 0:
            failures.append("the step has no gradient")
        if not found[name] <= most:
            failures.append(f"{name} between sampler and learner is {found[name]:.2g}, more than {most:g}")
        return found | {"failures": failures}

    def answers(self, bench: Bench) -> dict:
        task, rows = self.task, self.task.rows[:ANSWERED]
        prompts = [task.prompts.ids(row) for row in rows]
        groups = self.trainer.rollouter.roll_out(rows, prompts, 1, self.trainer.greedy, row_ids=range(len(rows)))
        readings = [read(rollout.text, task.prompts.chat.tool_format) for (rollout,) in groups]
        calls = sum(bool(reading.calls) and reading.bare for reading in readings)
        failures = [f"none of {len(rows)} greedy answers has only calls"] if self.demands and not calls else []
        return {"answers": len(rows), "calls": calls, "failures": failures}

    def precondition(self, bench: Bench) -> dict:
        rows, n = range(min(SAMPLED, len(self.drawn))), self.args.probe_rollouts
        asked = [(row, ()) for row in rows], [(row, self.drawn[row][0]) for row in rows]
        attempt = self.trainer.collector.attempt(PROBE_STREAM, "probe")
        raw, shown = (len(probe(prompts, n, attempt).hard) for prompts in asked)
        fewer, least = raw - shown, LEAST_FEWER_HARD * len(rows)
        why = f"demonstrations make {fewer} of {len(rows)} rows less hard, and {least:.1f} are needed"
        failures = [f"{why}: take another cold start"] if self.demands and fewer < least else []
        return {"rows": len(rows), "hard_raw": raw, "hard_shown": shown, "failures": failures}


def half_right(prompts: list, completions: list, completion_ids: list, **columns: list) -> list[float]:
    """A reward with which every group has a gradient, whatever the model writes."""
    return [float(place % 2) for place in range(len(prompts))]


def pass_gates(gates: Iterable[Fact | Command], journal: Journal, bench: Bench, deadline: float) -> None:
    """Raises InputError at the first gate that fails; ends the process if a kernel has broken it, or hangs."""
    for gate in gates:
        find_all([gate], journal, bench, deadline, lambda: os._exit(2))
        line = journal.facts[gate.name]
        if line["status"] != "ok":
            why = line.get("error") or "; ".join(line.get("failures", ["there is no time for it: give more --minutes"]))
            raise InputError(f"{gate.name}: {why}; so no arm is trained.")


def prepare(record: Record, journal: Journal, bench: Bench, deadline: float, cores: int) -> int:
    """Passes the gates and trains the cold start if there is none; returns how many runs fit the memory."""
    trained = record.cold != record.run(COLD, 0) or record.finished(COLD, 0)
    model = record.cold if trained else parse_train(record.flags(COLD, 0)).model
    raw = Gates(record, model, bench.scratch / "raw", half_right)
    gates: list[Fact | Command] = [Fact("model", 20, raw.model), Fact("room", 10, raw.room), Fact("step", 40, raw.step)]
    if not trained:
        gates.append(record.command(COLD, 0, cores, seconds=60))
    pass_gates(gates, journal, bench, deadline)
    own = Gates(record, record.cold, bench.scratch / "cold")
    parts = {"cold start": own.model, "answers": own.answers, "precondition": own.precondition}
    pass_gates([Fact(name, 20, gate) for name, gate in parts.items()], journal, bench, deadline)
    raw.trainer = own.trainer = raw.task = own.task = None
    gc.collect()
    torch.cuda.empty_cache()  # the memory is for the runs
    return raw.processes


def train_pairs(
    seeds: Iterable[int],
    begin: Callable[[int], Sequence[Job]],
    keep: Callable[[int, str, float], None],
    *,
    at_once: int,
    deadline: float,
    longest: float = 0.0,
) -> None:
    """Runs pairs until the deadline.

    Args:
        begin: starts the unfinished runs of a seed.
        keep: receives the seed, status ("ok", "failed", "incomplete" or "no time") and seconds of each pair.
        longest: seconds of the longest pair so far; with less time left no pair starts.
    """
    left, running = list(seeds), {}
    try:
        while left or running:
            ended = []
            for seed, (jobs, began) in list(running.items()):
                codes, seconds = [job.process.poll() for job in jobs], time.monotonic() - began
                whole, failed = all(code == 0 for code in codes), any(codes)
                if not (whole or failed or time.monotonic() >= deadline):
                    continue
                for job in jobs:  # if one has failed, its partner alone is not a pair
                    job.end()
                del running[seed]
                longest = max(longest, seconds) if whole else longest
                ended.append((seed, "ok" if whole else "failed" if failed else "incomplete", round(seconds, 1)))
            while left and len(running) < at_once and time.monotonic() + longest < deadline:
                running[left[0]] = begin(left[0]), time.monotonic()
                del left[0]
            for pair in ended:
                keep(*pair)
            if not running:
                break
            time.sleep(0.2)
    finally:
        for jobs, _ in running.values():
            for job in jobs:
                job.end()
    for seed in left:
        keep(seed, "no time", 0.0)


def train(record: Record, results: Path, journal: Journal, bench: Bench, deadline: float) -> None:
    """Runs gates, cold start and pairs, and writes the results after each pair."""
    cores = len(os.sched_getaffinity(0))
    room = min(prepare(record, journal, bench, deadline, cores), cores // CORES)
    at_once = max(1, min(record.at_once, room // len(ARMS)))
    threads = max(1, cores // (at_once * len(ARMS)))
    known = [line["seconds"] for name, line in journal.facts.items() if name.startswith("pair")]
    whole = [seed for seed in record.seeds if all(record.finished(arm, seed) for arm in ARMS)]

    def begin(seed: int) -> list[Job]:
        return [Job(record.command(arm, seed, threads), bench) for arm in ARMS if not record.finished(arm, seed)]

    def write() -> list[Arm]:
        runs = [record.run(arm, seed) for seed in sorted(whole) for arm in ARMS]
        export.main(str(results / "runs.json"), *map(str, runs))
        arms = arms_of([read_run(run) for run in runs], ARMS * len(whole))
        write_comparison(results, arms)
        return arms

    def keep(seed: int, status: str, seconds: float) -> None:
        logs = sorted(bench.logs.glob(f"*-seed{seed}.log")) if status == "failed" else []
        failures = [f"{log.stem}: {last_line(log.read_text(errors='replace'))}" for log in logs]
        journal.write(f"pair {seed}", status, seconds=seconds, at_once=at_once, failures=failures)
        if status == "ok":
            whole.append(seed)
            write()

    left = [seed for seed in record.seeds if seed not in whole]
    train_pairs(left, begin, keep, at_once=at_once, deadline=deadline, longest=max(known, default=0.0))
    if not whole:
        raise InputError("No pair was finished: give more --minutes, or a smaller --max_fe.")
    print(describe(write()))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the runs, and of the results unless OUT names another")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--bundle", type=Path, help="folder of rows and, optionally, a cold start")
    size.add_argument("--toy", action="store_true", help="the tiny model and a built-in task: no figure means anything")
    parser.add_argument("--minutes", type=MINUTES, default=8, help="time limit of the whole call (default: 8)")
    parser.add_argument("--seeds", type=SEED, nargs="+", default=range(8), help="of pairs, in order (default: 0 to 7)")
    parser.add_argument("--at-once", type=WORKERS, default=2, help="most pairs at a time (default: 2)")
    parser.add_argument("--device", default="cuda", help="cpu is for --toy")
    own, more = parser.parse_known_args(argv)
    deadline = time.monotonic() + 60 * own.minutes - LAST_SECONDS
    for number in (signal.SIGINT, signal.SIGTERM):  # either ends the runs too
        signal.signal(number, signal.default_int_handler)
    results = Path(os.environ.get("OUT") or own.folder).resolve()
    try:
        device = resolve_device(own.device)
        folder, bundle = own.folder.resolve(), own.bundle and own.bundle.resolve()
        record = Record(folder, bundle, str(device), more, own.seeds, own.at_once)
        logs, facts = folder / "logs", results / "facts.jsonl"
        for path in (results, logs):
            path.mkdir(parents=True, exist_ok=True)
        known = read_journal(facts) if facts.exists() else {}
        pairs = {name: line for name, line in known.items() if name.startswith("pair") and line["status"] == "ok"}
        journal = Journal(facts, pairs, without_paths(), commit())
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with tempfile.TemporaryDirectory() as scratch:
            bench = Bench(device, own.toy, Path(scratch), logs, path)
            journal.write("machine", "ok", **machine(bench))
            try:
                train(record, results, journal, bench, deadline)
            finally:
                shutil.make_archive(str(results / "logs"), "gztar", folder, "logs")
    except InputError as error:
        print(f"bench.learning.gpu: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench.learning.gpu: interrupted; whole pairs are kept.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
