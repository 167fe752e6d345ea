"""The folder of one run: config.yaml, metrics.jsonl, rollouts.jsonl, hard_samples.jsonl, curves.png, summary.json,
checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from io import BytesIO
from pathlib import Path

import yaml

from toolx_kernels.errors import InputError, first_line
from toolx_kernels.files import write_atomically
from toolx_kernels.models.load import checkpoints, latest_checkpoint
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.run.checkpoint import gone, remove, sweep

CONFIG, METRICS, ROLLOUTS, HARD_SAMPLES, SUMMARY, CURVES, TRACE = (
    "config.yaml", "metrics.jsonl", "rollouts.jsonl", "hard_samples.jsonl", "summary.json", "curves.png", "trace.json",
)  # fmt: skip
LOGS, REPLACED = (METRICS, ROLLOUTS), (CONFIG, HARD_SAMPLES, SUMMARY)  # appended to; written anew each time
MAY_DIFFER = (
    "resume", "overwrite", "max_steps", "max_tokens", "max_fe", "num_train_epochs", "device", "output_dir",
    "log_completions", "save_steps", "save_total_limit", "profile_step",
    "date",  # the run keeps its own, and its prompts are compared
    # these change the last bits of a gradient, and may be what lets a run that was out of memory go on
    "micro_batch_tokens", "gradient_checkpointing",
)  # fmt: skip


def binding_settings(config: ToolExpanderConfig) -> dict:
    """The settings that a resumed run must share with the one before."""
    return {name: value for name, value in config.to_dict().items() if name not in MAY_DIFFER}


def check_same_settings(path: Path, before: dict, config: ToolExpanderConfig) -> None:
    """Raises InputError, naming each setting that differs from those ``before``, of a run or checkpoint at ``path``.

    A setting that did not exist then had the effect of its present default; one that is gone had better have none.
    """
    defaults = ToolExpanderConfig().to_dict()
    differing = [
        f"{name}={before.get(name, defaults[name])!r}, not {value!r}"
        for name, value in binding_settings(config).items()
        if before.get(name, defaults[name]) != value
    ]
    differing += [f"{name}={before[name]!r}, which is no setting here" for name in before if name not in defaults]
    if differing:
        raise InputError(
            f"{path} was run with {', and '.join(differing)}: resume with the same settings, or start another run "
            "folder."
        )


class RunFolder:
    """Where a run writes. Lines are appended and flushed whole; files are replaced atomically.

    Every line of metrics.jsonl has an ``event`` ("data", "plan", "cold_start", "probe", "step", "sft" or "eval") and
    the ``step`` it belongs to; what depends on the machine stands under ``timing``, so that runs compare without it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def check(self, config: ToolExpanderConfig) -> None:
        """Raises InputError when the folder's content and the flags do not go together; touches nothing."""
        there = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not there.is_dir():
            raise InputError(f"output_dir={self.path}: {there} is a file, so choose a folder.")
        if not os.access(there, os.W_OK | os.X_OK):
            raise InputError(f"output_dir={self.path}: {there} must not be written to, so choose another folder.")
        holds_run = (self.path / CONFIG).exists()
        leftovers = (path for path in self.path.iterdir() if path.suffix != ".part") if self.path.is_dir() else ()
        if not holds_run and any(leftovers):
            raise InputError(f"output_dir={self.path} holds other files and no run: choose an empty or new folder.")
        if holds_run and not (config.resume or config.overwrite):
            raise InputError(f"{self.path} already holds a run: pass --resume to go on, or --overwrite to delete it.")
        if config.resume:
            if not holds_run:
                raise InputError(f"{self.path} holds no run to resume: start one without --resume.")
            check_same_settings(self.path, self.config(), config)

    def config(self) -> dict:
        """The settings that the run was started with."""
        path = self.path / CONFIG
        try:
            settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            settings = None
        if not isinstance(settings, dict) or not settings.keys() & ToolExpanderConfig.__dataclass_fields__.keys():
            raise InputError(f"{path} is damaged: start another run folder, or pass --overwrite.")
        return settings

    def date(self, resume: bool) -> str:
        """The day on which the run began, as YYYY-MM-DD; of a new one, today."""
        began = self.config().get("date") if resume else None
        return str(began or date.today())

    def start(self, config: ToolExpanderConfig) -> None:
        """An empty folder with the run's config, or the one to resume as it is."""
        if config.overwrite and (self.path / CONFIG).exists():
            for checkpoint in checkpoints(self.path):
                remove(checkpoint)
            # last what says that there is a run
            for name in (METRICS, ROLLOUTS, HARD_SAMPLES, SUMMARY, CURVES, TRACE, CONFIG):
                (self.path / name).unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / SUMMARY).unlink(missing_ok=True)  # of the run before it is resumed
        sweep(self.path)
        for name in REPLACED:
            (self.path / f"{name}.part").unlink(missing_ok=True)
        if not config.resume:
            settings = {k: v for k, v in config.to_dict().items() if k not in ("resume", "overwrite")}
            self._replace(CONFIG, yaml.safe_dump(settings, sort_keys=False))

    def latest_checkpoint(self) -> Path | None:
        return latest_checkpoint(self.path)

    def log(self, event: str, step: int, timing: dict, **values) -> dict:
        record = {"event": event, "step": step, **values, "timing": timing}
        self._append(METRICS, record)
        return record

    def log_rollout(self, **values) -> None:
        self._append(ROLLOUTS, values)

    def _append(self, name: str, record: dict) -> None:
        with self._writing(name), open(self.path / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")

    def _replace(self, name: str, text: str) -> None:
        with self._writing(name):
            write_atomically(self.path / name, text)

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """Says in one sentence why a file cannot be written."""
        try:
            yield
        except OSError as error:
            if not self.path.is_dir():
                raise gone(self.path) from None
            why = error.strerror or first_line(error)
            raise InputError(
                f"{self.path / name} could not be written ({why}): mend that, and --resume goes on from the last "
                "checkpoint."
            ) from None

    def metrics(self) -> list[dict]:
        path = self.path / METRICS
        return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []

    def forget_after(self, lines: dict[str, int]) -> None:
        """Drops what was logged after the checkpoint that is resumed, given the lines each file had then.

        Raises:
            InputError: a file has fewer whole lines; none has been changed then.
        """
        ends = {}
        for name in LOGS:
            path, start = self.path / name, 0
            with open(path, "rb") if path.exists() else BytesIO() as file:
                for number in range(lines[name]):  # as bytes, because text has more ends of line than \n
                    line = file.readline()
                    if not line.endswith(b"\n"):
                        raise InputError(
                            f"{path} has {number} whole lines, and the checkpoint counts {lines[name]}: put back what "
                            "was there, or start another run folder."
                        )
                    start += len(line)
            ends[path] = start
        for path, end in ends.items():
            if path.exists():
                os.truncate(path, end)

    def lines(self) -> dict[str, int]:
        """How many lines each log holds, all of them on disk."""
        counts = dict.fromkeys(LOGS, 0)
        for name in LOGS:
            if (path := self.path / name).exists():
                with open(path, "rb") as file:
                    counts[name] = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
                    os.fsync(file.fileno())
        return counts

    def write_hard_samples(self, lines: list[dict]) -> None:
        """The table of every probed row's state, replaced as a whole."""
        self._replace(HARD_SAMPLES, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def write_summary(self, summary: dict) -> None:
        self._replace(SUMMARY, json.dumps(summary, indent=1) + "\n")
