"""Measurement of a case of whole steps: each trainer in a separate process, all of them taking turns.

A process loads the model, builds its trainer and waits; on request it takes one step, measures it, and waits again. So
all trainers have the same conditions in a round, and the peak of a process is that of one trainer alone. The first step
warms up: it creates optimizer states and caches. A case in which the trainers did not do the same work is an error.
"""

from __future__ import annotations

import math
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.common.absent import Absent, why_absent
from bench.common.machine import package_version
from bench.common.timing import MIB, peak, reset_peak, synchronize, take_rounds
from bench.step.cases import SETTINGS, Case, Count, Settings, make_rows
from bench.step.providers import StepProvider, Toolx
from toolx_kernels.models.load import load_model
from toolx_kernels.toolcall.chat import Chat

START_S = 300.0  # to import, to load the model and to build the trainer


def work(pipe: Connection, kind: type[StepProvider], case: Case, settings: Settings, device: str) -> None:
    """The main function of a trainer's process. Sends ("ready", None) before each step, which begins when a message
    arrives, ("step", its record) after it, ("done", updates) at the end, or ("failed", (why, the traceback))."""
    try:
        model, tokenizer = load_model(case.model, case.dtype, device)
        rows = make_rows(case, chat := Chat(tokenizer))
        count = Count(case, [len(chat.prompt_ids(row)) for row in rows])
        count.watch(model)
        with tempfile.TemporaryDirectory() as folder:
            trainer = kind(model, tokenizer, case, settings, rows, count.reward, Path(folder))

            def begin() -> None:
                pipe.send(("ready", None))
                pipe.recv()
                reset_peak(model.device)
                trainer.own_peak()
                count.begin()

            def end() -> None:
                synchronize(model.device)
                record = count.end()
                pipe.send(("step", record | {"peak": max(peak(model.device), trainer.own_peak())}))

            trainer.run(begin, end)
            pipe.send(("done", trainer.updates()))
    except Exception as error:  # a peer may fail in any way, which the report then names
        pipe.send(("failed", (why_absent(kind.package, error), traceback.format_exc())))


class Worker:
    """A handle on a trainer's process."""

    def __init__(self, kind: type[StepProvider], case: Case, settings: Settings, device: str):
        self.kind, self.case = kind, case
        self.records: list[dict] = []
        self.updates: list[dict] = []
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, kind, case, settings, device), daemon=True)
        self.process.start()
        other.close()

    def expect(self, wanted: Sequence[str], limit_s: float):
        """Returns the next message, one of ``wanted``. Raises ``Absent`` for a peer's failure, ``RuntimeError`` for
        ours."""
        try:
            if not self.pipe.poll(limit_s):
                raise Absent(f"no answer within {limit_s:.0f} s")
            what, content = self.pipe.recv()
        except EOFError:
            self.process.join()
            what, content = "failed", (f"its process ended with status {self.process.exitcode}",) * 2
        if what == "failed":
            why, details = content
            raise RuntimeError(details) if issubclass(self.kind, Toolx) else Absent(why)
        if what not in wanted:
            raise RuntimeError(f"{self.kind.name} took another number of steps than {self.case.steps}")
        return what, content

    def step(self) -> None:
        self.pipe.send("go")
        self.records.append(self.expect(["step"], self.case.limit_s)[1])
        what, content = self.expect(["done" if len(self.records) == self.case.steps else "ready"], START_S)
        if what == "done":
            self.updates = content

    def close(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join()


def measure(
    case: Case,
    kinds: Sequence[type[StepProvider]],
    device: torch.device,
    settings: Settings = SETTINGS,
    benchmark: Any | None = None,
) -> dict:
    """Times ``kinds``, of which ours comes first; returns a record for each, with the reason, ``absent``, instead if it
    cannot run.

    ``benchmark``, pytest-benchmark's fixture, times our steps too.
    """
    workers: dict[str, Worker] = {}
    records: dict[str, dict] = {}

    def attempt(name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Absent as reason:
            records[name] = {"provider": name, "absent": str(reason)}
            workers.pop(name).close()

    def take_steps(names: Sequence[str]) -> None:
        for name in names:
            attempt(name, workers[name].step)

    try:
        for kind in kinds:
            workers[kind.name] = worker = Worker(kind, case, settings, str(device))
            attempt(kind.name, lambda worker=worker: worker.expect(["ready"], START_S))
        take_steps(list(workers))

        def others() -> tuple[list[str]]:
            take_steps([name for name in workers if name != Toolx.name])
            return ([Toolx.name],)

        take_rounds(take_steps, others, case.rounds, benchmark)
    finally:
        for worker in workers.values():
            worker.close()
    for name, worker in workers.items():
        check_work(worker, case, settings)
        records[name] = {"provider": name} | figures(worker.records)
    return {
        "case": asdict(case) | {"threads": torch.get_num_threads()},
        "records": [records[kind.name] for kind in kinds],
        "versions": {name: package_version(name) for name in ("transformers", "trl", "accelerate")},
    }


def check_work(worker: Worker, case: Case, settings: Settings) -> None:
    """Raises ``RuntimeError`` if a trainer did not do the case's work."""
    rewards = [float(place % 2 * (place // case.n >= case.dead_groups)) for place in range(case.rows)]
    for record in worker.records:
        lengths = record["lengths"]
        if len(lengths) != case.rows or record["rewards"] != rewards:
            raise RuntimeError(f"{worker.kind.name} rewarded {len(lengths)} completions instead of {case.rows}")
        if not case.stop and set(lengths) != {case.new} or max(lengths) > case.new:
            raise RuntimeError(f"{worker.kind.name} sampled {sorted(set(lengths))} tokens instead of {case.new}")
    if len(worker.updates) != case.steps:
        raise RuntimeError(f"{worker.kind.name} updated {len(worker.updates)} times instead of {case.steps}")
    for update in worker.updates:
        if update["learning_rate"] != settings.learning_rate:
            raise RuntimeError(f"{worker.kind.name} updated at {update['learning_rate']}, not {settings.learning_rate}")
        if not 0 < update["grad_norm"] < math.inf:
            raise RuntimeError(f"{worker.kind.name} had a gradient of norm {update['grad_norm']}")


def figures(records: Sequence[dict]) -> dict:
    """Medians of the timed steps, which are all but the first; the peak of memory over all steps."""
    timed = records[1:]
    middle = {name: median(record[name] for record in timed) for name in ("step_s", "rollout_s")}
    trained, unshared, shared, written = (
        sum(sum(record[name]) if name == "lengths" else record[name] for record in timed)
        for name in ("trained_tokens", "unshared_tokens", "shared_tokens", "lengths")
    )
    rewards = [reward for record in timed for reward in record["rewards"]]
    return {
        "step_s": round(middle["step_s"], 4),
        "rollout_s": round(middle["rollout_s"], 4),
        "update_s": round(median(record["step_s"] - record["rollout_s"] for record in timed), 4),
        "tokens_per_s": round(written / sum(record["step_s"] for record in timed), 2),
        "mean_tokens": round(written / len(rewards), 2),
        "mean_reward": round(sum(rewards) / len(rewards), 4),
        "peak_mib": round(max(record["peak"] for record in records) / MIB, 1),
        "trained_tokens": round(trained / len(timed)),
        "sharing": round(unshared / trained, 4),
        "sharing_possible": round(unshared / shared, 4),
        "rounds_s": [round(record["step_s"], 4) for record in timed],
    }
