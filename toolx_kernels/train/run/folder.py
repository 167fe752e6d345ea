"""The run folder: config.yaml, metrics.jsonl, rollouts.jsonl, hard_samples.jsonl, curves.png, summary.json and
checkpoints; and run.lock while a run writes to it."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import date
from io import BytesIO
from pathlib import Path

import yaml

from toolx_kernels.errors import InputError, counted, first_line
from toolx_kernels.files import write_atomically
from toolx_kernels.models.load import checkpoints, latest_checkpoint
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.run.checkpoint import remove, sweep
from toolx_kernels.train.run.lock import LOCK, RunLock, check_free, gone
from toolx_kernels.train.run.metrics import Reader, read_line, read_object, readable
from toolx_kernels.train.run.places import absolute, without_folders

CONFIG, METRICS, ROLLOUTS, HARD_SAMPLES, SUMMARY, CURVES, TRACE = (
    "config.yaml", "metrics.jsonl", "rollouts.jsonl", "hard_samples.jsonl", "summary.json", "curves.png", "trace.json",
)  # fmt: skip
Mark = tuple[int, int]  # the lines of a log, and the CRC of their bytes
NOTHING: Mark = (0, 0)
NOUNS = {"cold_start": "cold-start step", "sft": "step", "step": "step", "probe": "probe", "eval": "evaluation"}
LOGS, REPLACED = (METRICS, ROLLOUTS), (CONFIG, HARD_SAMPLES, SUMMARY)  # appended to; replaced as a whole
# the log and the config last, because they mark the folder as a run
OWN = (ROLLOUTS, HARD_SAMPLES, SUMMARY, CURVES, TRACE, METRICS, CONFIG)
MAY_DIFFER = (
    "resume", "overwrite", "max_steps", "max_tokens", "max_fe", "num_train_epochs", "device", "output_dir",
    "log_completions", "save_steps", "save_total_limit", "profile_step",
    "date",  # the run keeps its own, and its prompts are compared
    # these change only the last bits of a gradient, and may let a run continue that was out of memory
    "micro_batch_tokens", "gradient_checkpointing",
)  # fmt: skip


def binding_settings(config: ToolExpanderConfig) -> dict:
    """Returns the settings that a resumed run must share with the original run, with absolute paths."""
    return {name: value for name, value in absolute(config.to_dict()).items() if name not in MAY_DIFFER}


def check_same_settings(path: Path, before: dict, config: ToolExpanderConfig) -> None:
    """Raises InputError naming each setting that differs from ``before``, the settings of the run or checkpoint at
    ``path``.

    A setting added since counts as its default; a setting that no longer exists is reported.
    """
    defaults = ToolExpanderConfig().to_dict()
    then, now = without_folders(defaults | before), without_folders(binding_settings(config))
    differing = [f"{name}={then[name]!r}, not {value!r}" for name, value in now.items() if then[name] != value]
    differing += [f"{name}={before[name]!r}, which is not a setting now" for name in before if name not in defaults]
    if differing:
        raise InputError(
            f"{path} was run with {', and '.join(differing)}: resume with the same settings, or start another run "
            "folder."
        )


def _settings(path: Path) -> dict | None:
    """The settings in a config.yaml; None if it is damaged."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        return None
    return found if isinstance(found, dict) else None


def _reader(path: Path) -> Reader:
    parse = read_line if path.name == METRICS else read_object
    return Reader(path, "restore the file, or start another run folder", parse)


class RunFolder:
    """The files of one run. Lines are appended and flushed whole; files are replaced atomically.

    Every line of metrics.jsonl has an ``event`` ("data", "plan", "cold_start", "probe", "step", "sft", "eval" or
    "notice") and the ``step`` it belongs to. Machine-dependent values are under ``timing``, so that the rest is equal
    in equal runs.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()  # users' functions may change the working directory
        self._lock: RunLock | None = None  # held while this object writes a run
        self._started = False

    @contextmanager
    def writing(self, config: ToolExpanderConfig) -> Iterator[None]:
        """Context in which no other process, and no other trainer, writes to the folder, which is made if absent.

        Raises InputError if the folder is in use, or as ``check`` does, of which the answer cannot change any more.
        """
        self.check(config)
        made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with RunLock(self.path) as lock:
                self.check_content(config)
                self._lock = lock
                try:
                    yield
                finally:
                    self._lock = None
        finally:
            with suppress(OSError):
                for path in made:  # if nothing was written
                    path.rmdir()

    def check_lock(self) -> None:
        """Raises InputError if the folder is no longer this run's alone."""
        if self._lock:
            self._lock.check()

    def check(self, config: ToolExpanderConfig) -> None:
        """Raises InputError if the folder is in use, or its content and the settings do not fit together; changes
        nothing."""
        check_free(self.path)
        self.check_content(config)

    def check_content(self, config: ToolExpanderConfig) -> None:
        """``check`` of a folder that may be in use."""
        there = next(path for path in (self.path, *self.path.parents) if os.path.exists(path))
        if not there.is_dir():
            raise InputError(f"output_dir={config.output_dir}: {there} is a file, so choose a folder.")
        if not os.access(there, os.W_OK | os.X_OK):
            raise InputError(f"output_dir={config.output_dir}: {there} is not writable, so choose another folder.")
        longest = os.pathconf(there, "PC_NAME_MAX")  # in bytes
        if too_long := [part for part in self.path.parts if len(os.fsencode(part)) > longest]:
            raise InputError(f"output_dir has the name {too_long[0][:40]}..., which is too long: choose a shorter one.")
        holds_run = self.holds_run()
        found = self.path.iterdir() if self.path.is_dir() else ()
        if not holds_run and any(path.suffix != ".part" and path.name != LOCK for path in found):
            raise InputError(
                f"output_dir={config.output_dir} holds other files but no run: choose an empty or new folder."
            )
        self._check_kinds()
        outer = (path for path in self.path.resolve().parents if RunFolder(path).holds_run())
        if not holds_run and (run := next(outer, None)):
            raise InputError(
                f"output_dir={config.output_dir} is inside {run}, which holds a run: choose a folder outside it."
            )
        if holds_run and not (config.resume or config.overwrite):
            raise InputError(
                f"{self.path} already holds a run: pass --resume to continue it, or --overwrite to delete it, or "
                "choose another --output_dir."
            )
        if config.resume:
            if not holds_run:
                raise InputError(f"{self.path} holds no run to resume: start one without --resume.")
            check_same_settings(self.path, self.config(), config)
            self._check_saved()

    def holds_run(self) -> bool:
        """Whether the folder holds a run of this package: a config.yaml with most of its settings, as a run writes it,
        or any other beside a log that begins as a run's. Others have a config.yaml and checkpoints, too."""
        if not (self.path / CONFIG).is_file():
            return False
        known = ToolExpanderConfig.__dataclass_fields__.keys()
        if 2 * len(known & (_settings(self.path / CONFIG) or {}).keys()) > len(known):
            return True
        return self.log_begins()

    def log_begins(self) -> bool:
        """Whether metrics.jsonl begins as that of a run."""
        if not (self.path / METRICS).is_file():
            return False
        try:
            with open(self.path / METRICS, "rb") as file:
                return "timing" in read_line(file.readline())
        except (OSError, ValueError):
            return False

    def _check_kinds(self) -> None:
        """Raises InputError if something else has the name of a file or a checkpoint of a run."""
        for name in (*OWN, *(f"{name}.part" for name in REPLACED), LOCK):
            path = self.path / name
            if os.path.lexists(path) and (not path.is_file() or (name == LOCK and path.is_symlink())):
                raise InputError(f"{path} is no plain file: move it away, or choose another --output_dir.")
        for path in self.path.glob("checkpoint-*"):
            if re.fullmatch(r"checkpoint-\d+", path.name) and not path.is_dir():
                raise InputError(f"{path} is no folder that can be reached: mend that, or choose another --output_dir.")

    def _check_saved(self) -> None:
        """Raises InputError if all checkpoints are gone: a run has one before its first probe and step."""
        if latest_checkpoint(self.path):
            return
        path = self.path / METRICS
        with open(path, "rb") if path.exists() else BytesIO() as file:
            later = [record["step"] for record in readable(file) if record["event"] in ("probe", "sft", "step")]
        if later or any((self.path / name).exists() for name in (ROLLOUTS, HARD_SAMPLES, SUMMARY)):
            raise InputError(
                f"{self.path} has logged {counted(max(later, default=0), 'step')} and holds no checkpoint: put its "
                "last checkpoint-<step> folder back, or start the run again with --overwrite."
            )

    def config(self) -> dict:
        """Returns the settings that the run was started with."""
        path = self.path / CONFIG
        settings = _settings(path)
        if settings is None or not settings.keys() & ToolExpanderConfig.__dataclass_fields__.keys():
            raise InputError(f"{path} is damaged: start another run folder, or pass --overwrite.")
        return settings

    def settled(self, config: ToolExpanderConfig) -> ToolExpanderConfig:
        """Returns the settings with absolute paths and a date: that of the run's first day, as YYYY-MM-DD."""
        began = self.config().get("date") if config.resume else None
        settings = absolute(config.to_dict())
        return ToolExpanderConfig(**settings | {"date": config.date or str(began or date.today())})

    def start(self, config: ToolExpanderConfig) -> None:
        """Prepares the folder: a new run gets an empty one with its config, a resumed run keeps its files."""
        if config.overwrite and self.holds_run():
            for checkpoint in checkpoints(self.path):
                remove(checkpoint)
            for name in OWN:
                (self.path / name).unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / SUMMARY).unlink(missing_ok=True)  # of the run before this resumption
        sweep(self.path)
        for name in REPLACED:
            (self.path / f"{name}.part").unlink(missing_ok=True)
        if not config.resume:
            settings = {k: v for k, v in config.to_dict().items() if k not in ("resume", "overwrite")}
            self._replace(CONFIG, yaml.safe_dump(settings, sort_keys=False))
        self._started = True

    def check_started(self) -> None:
        """Raises InputError if this object has begun no run."""
        if not self._started:
            raise InputError(f"No run has begun in {self.path}: call train(), which calls step() itself.")

    def way_on(self) -> str:
        """How a run that was stopped goes on, in words."""
        if saved := self.latest_checkpoint():
            return f"--resume continues from {saved}"
        if not self.holds_run():
            return "no run had begun, so the same command starts it"
        try:
            self._check_saved()
        except InputError as error:
            return str(error).removesuffix(".")
        return "nothing was saved yet, so --overwrite starts it again"

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
        """Context that turns an OSError into an InputError saying why the file cannot be written."""
        self.check_lock()
        try:
            yield
        except OSError as error:
            if not self.path.is_dir():
                raise gone(self.path) from None
            why = error.strerror or first_line(error)
            raise InputError(
                f"{self.path / name} could not be written ({why}): fix that, and --resume continues from the last "
                "checkpoint."
            ) from None

    def metrics(self) -> list[dict]:
        """Raises InputError, naming the line, if one is damaged."""
        path = self.path / METRICS
        lines = path.read_bytes().splitlines() if path.exists() else []
        return [*map(_reader(path).read, lines)]

    def forget_after(self, marks: dict[str, Mark]) -> str:
        """Truncates each log to what it held at the resumed checkpoint, which kept ``marks``; returns what that drops
        in words, e.g. ``2 steps and 1 probe``.

        Raises:
            InputError: a file has fewer whole lines, or a damaged or other one among these; then no file is changed.
        """
        ends: dict[Path, int] = {}
        dropped: list[dict] = []
        for name in LOGS:
            path, start, crc, (lines, kept) = self.path / name, 0, 0, marks[name]
            reader = _reader(path)
            with open(path, "rb") if path.exists() else BytesIO() as file:
                for number in range(lines):  # as bytes, because text mode splits at more than \n
                    line = file.readline()
                    if not line.endswith(b"\n"):
                        raise InputError(
                            f"{path} has {counted(number, 'whole line')}, and the checkpoint counts {lines}: "
                            "restore the file, or start another run folder."
                        )
                    reader.read(line)
                    start, crc = start + len(line), zlib.crc32(line, crc)
                if crc != kept:
                    raise InputError(
                        f"{path} has changed in the {counted(lines, 'line')} that the checkpoint counts: restore the "
                        "file, or start another run folder."
                    )
                dropped += readable(file) if name == METRICS else []
            ends[path] = start
        for path, end in ends.items():
            if path.exists():
                os.truncate(path, end)
        kinds = Counter(NOUNS[record["event"]] for record in dropped if record["event"] in NOUNS)
        return " and ".join(counted(number, noun) for noun, number in kinds.items())

    def marks(self) -> dict[str, Mark]:
        """Returns the number of lines and the CRC of each log, after syncing them to disk."""
        found = dict.fromkeys(LOGS, NOTHING)
        for name in LOGS:
            if (path := self.path / name).exists():
                with open(path, "rb") as file:
                    lines, crc = NOTHING
                    while block := file.read(1 << 20):
                        lines, crc = lines + block.count(b"\n"), zlib.crc32(block, crc)
                    found[name] = lines, crc
                    os.fsync(file.fileno())
        return found

    def write_hard_samples(self, lines: list[dict]) -> None:
        """Replaces the table of row states, one line per row."""
        self._replace(HARD_SAMPLES, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def write_summary(self, summary: dict) -> None:
        self._replace(SUMMARY, json.dumps(summary, indent=1) + "\n")
