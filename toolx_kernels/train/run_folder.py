"""The folder of one run: config.yaml, metrics.jsonl, rollouts.jsonl, hard_samples.jsonl, curves.png, summary.json,
checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import yaml

from toolx_kernels.errors import InputError
from toolx_kernels.train.checkpoint import checkpoints, latest_checkpoint, write_atomically
from toolx_kernels.train.config import ToolExpanderConfig

CONFIG, METRICS, ROLLOUTS, HARD_SAMPLES, SUMMARY, CURVES = (
    "config.yaml", "metrics.jsonl", "rollouts.jsonl", "hard_samples.jsonl", "summary.json", "curves.png",
)  # fmt: skip
MAY_DIFFER = (
    "resume", "overwrite", "max_steps", "max_tokens", "num_train_epochs", "device", "output_dir", "log_completions",
)  # fmt: skip


class RunFolder:
    """Where a run writes. Lines are appended and flushed whole; files are replaced atomically.

    Every line of metrics.jsonl has an ``event`` ("data", "cold_start", "probe", "step", "eval") and the ``step`` it
    belongs to; what depends on the machine stands under ``timing``, so that two runs can be compared without it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def check(self, config: ToolExpanderConfig) -> None:
        """Raises InputError when the folder's content and the flags do not go together; touches nothing."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"output_dir={self.path} is a file: choose a folder.")
        holds_run = (self.path / CONFIG).exists()
        leftovers = (path for path in self.path.iterdir() if path.suffix != ".part") if self.path.is_dir() else ()
        if not holds_run and any(leftovers):
            raise InputError(f"output_dir={self.path} holds other files and no run: choose an empty or new folder.")
        if holds_run and not (config.resume or config.overwrite):
            raise InputError(f"{self.path} already holds a run: pass --resume to go on, or --overwrite to delete it.")
        if config.resume:
            if not holds_run:
                raise InputError(f"{self.path} holds no run to resume: start one without --resume.")
            self._check_same_run(config)

    def _check_same_run(self, config: ToolExpanderConfig) -> None:
        before = self.config()
        for name, value in config.to_dict().items():
            if name not in MAY_DIFFER and name in before and before[name] != value:
                raise InputError(
                    f"{self.path} was run with {name}={before[name]}, not {value}: resume with the same {name}, or "
                    "start another run folder."
                )

    def config(self) -> dict:
        """The settings that the run was started with."""
        path = self.path / CONFIG
        try:
            settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            settings = None
        if not isinstance(settings, dict):
            raise InputError(f"{path} is damaged: start another run folder, or pass --overwrite.")
        return settings

    def start(self, config: ToolExpanderConfig) -> None:
        """An empty folder with the run's config, or the one to resume as it is."""
        if config.overwrite and (self.path / CONFIG).exists():
            for checkpoint in (*checkpoints(self.path), *self.path.glob(".checkpoint-*")):
                shutil.rmtree(checkpoint)
            # last what says that there is a run
            for name in (METRICS, ROLLOUTS, HARD_SAMPLES, SUMMARY, CURVES, CONFIG):
                (self.path / name).unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / SUMMARY).unlink(missing_ok=True)  # of the run before it is resumed
        if not config.resume:
            settings = {k: v for k, v in config.to_dict().items() if k not in ("resume", "overwrite")}
            write_atomically(self.path / CONFIG, yaml.safe_dump(settings, sort_keys=False))

    def latest_checkpoint(self) -> Path | None:
        return latest_checkpoint(self.path)

    def log(self, event: str, step: int, timing: dict, **values) -> dict:
        record = {"event": event, "step": step, **values, "timing": timing}
        self._append(METRICS, record)
        return record

    def log_rollout(self, **values) -> None:
        self._append(ROLLOUTS, values)

    def _append(self, name: str, record: dict) -> None:
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")

    def metrics(self) -> list[dict]:
        path = self.path / METRICS
        return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []

    def forget_after(self, lines: dict[str, int]) -> None:
        """Drops what was logged after the checkpoint that is resumed, given the lines each file had then."""
        for name in (METRICS, ROLLOUTS):
            path = self.path / name
            if path.exists():
                # as bytes: a text may hold other line ends (U+2028), which JSON leaves as they are
                kept = path.read_bytes().splitlines(keepends=True)[: lines[name]]
                write_atomically(path, b"".join(kept).decode())

    def lines(self) -> dict[str, int]:
        """How many lines each log holds."""
        paths = {name: self.path / name for name in (METRICS, ROLLOUTS)}
        return {name: path.read_bytes().count(b"\n") if path.exists() else 0 for name, path in paths.items()}

    def write_hard_samples(self, lines: list[dict]) -> None:
        """The table of every probed row's state, replaced as a whole."""
        write_atomically(
            self.path / HARD_SAMPLES, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        )

    def write_summary(self, summary: dict) -> None:
        write_atomically(self.path / SUMMARY, json.dumps(summary, indent=1) + "\n")
