"""Measurement of a model on a record's rows: hard training rows, and accuracy on held-out rows.

    python -m bench.learning.measure runs/coder/grpo-seed0.json --model runs/coder/grpo-seed0 \\
        --config bench/learning/configs/coder-arm.yaml \\
        --dataset runs/coder/data/rl.jsonl --eval_dataset runs/coder/data/bfcl.jsonl

Takes the flags of ``toolx train``. Each training row's raw prompt has ``--rollouts`` rollouts at the training
temperature, each row of ``--eval_dataset`` one greedy answer. An answer is

solved       if it earns the default reward: the right calls, in the requested format, and nothing else
right        if the calls in it are right, in the requested format, as ``toolx eval`` counts
format_free  if they are right as JSON or in tags, in a code fence or not, whatever else it says

A training row is *hard* if none of its rollouts is solved. All answers are next to the result, in ``.answers.jsonl``,
and are written as they are sampled: the same command continues where it stopped, and does nothing if all is measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

from bench.common.arguments import number
from toolx_kernels.cli.train import parse_train
from toolx_kernels.errors import InputError
from toolx_kernels.evaluate.intervals import wilson
from toolx_kernels.evaluate.scores import part_of
from toolx_kernels.files import write_atomically
from toolx_kernels.models.load import resolve
from toolx_kernels.toolcall.rewards import is_correct
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.toolcall.tool_format import HERMES, JSON
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.rounds import PROBE_STREAM
from toolx_kernels.train.rows import digest, load_rows
from toolx_kernels.train.trainer import ToolExpanderTrainer

COUNTED = ("solved", "right", "format_free")
AT_ONCE = 16  # answers that an interruption loses at most
SETTINGS = ("seed", "dtype", "tool_format", "temperature", "top_k", "top_p", "min_p", "max_completion_length")


def is_right_in_any_form(text: str, row: Row) -> bool:
    """Whether the calls in ``text`` are right for ``row``, however they are wrapped. The JSON format finds objects in
    fences, in prose and in tags, closed or not; Hermes tells which of several objects are in tags."""
    return any(is_correct(text, row, form) for form in (JSON, HERMES))


class Answers:
    """The file of a measurement's answers: the measurement in its first line, then a list of answers for each row."""

    def __init__(self, path: Path, measurement: dict):
        """Raises InputError if the file holds the answers of another measurement."""
        self.path, self.measurement = path, measurement
        self.of_rows: list[list[dict]] = []
        if path.exists():
            found, *self.of_rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            for name, value in measurement.items():
                if found[name] != value:
                    raise InputError(
                        f"{path} holds answers for {name}={found[name]!r}, not {value!r}: name another output, or "
                        "delete it."
                    )

    def add(self, of_rows: Sequence[list[dict]]) -> None:
        self.of_rows += of_rows
        lines = [self.measurement, *self.of_rows]
        write_atomically(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def answer(trainer: ToolExpanderTrainer, answers: Answers, rollouts: int) -> None:
    """Adds the missing answers: first to training rows, then to evaluation rows."""
    task = trainer.task
    train, everything = len(task.rows), [*task.rows, *task.eval_rows]
    while (start := len(answers.of_rows)) < len(everything):
        sampled = start < train
        n, params = (rollouts, trainer.collector.params) if sampled else (1, trainer.greedy)
        places = range(start, min(start + max(1, AT_ONCE // n), train if sampled else len(everything)))
        rows = [everything[place] for place in places]
        prompts = [task.prompts.ids(row) for row in rows]
        groups = trainer.rollouter.roll_out(rows, prompts, n, params, row_ids=places, step=PROBE_STREAM)
        answers.add(
            [
                [
                    {
                        "solved": solved,
                        "right": task.judge(rollout.answer_text, row),
                        "format_free": is_right_in_any_form(rollout.text, row),
                        "tokens": rollout.written,
                        "finish_reason": rollout.finish_reason,
                        "text": rollout.text,
                    }
                    for rollout, solved in zip(group, task.solves([row] * n, group), strict=True)
                ]
                for row, group in zip(rows, groups, strict=True)
            ]
        )


def on_training_rows(of_rows: Sequence[list[dict]]) -> dict:
    """Counts over the rollouts of each row; ``pass_at_1`` is the mean share of rollouts."""
    counts = {name: [sum(each[name] for each in of_row) for of_row in of_rows] for name in COUNTED}
    rollouts = len(of_rows[0])
    return {
        "rows": len(of_rows),
        "rollouts": rollouts,
        "hard": counts["solved"].count(0),
        "pass_at_1": {name: rounded(fmean(of_name) / rollouts) for name, of_name in counts.items()},
        "of_rows": counts,
    }


def on_held_out_rows(rows: Sequence[Row], of_rows: Sequence[list[dict]]) -> dict:
    """Accuracies with Wilson's 95 % intervals, right answers by category, and which rows are answered right."""
    result: dict = {"rows": len(rows), "cut_off": sum(each["finish_reason"] == "length" for (each,) in of_rows)}
    for name in COUNTED:
        flags = [each[name] for (each,) in of_rows]
        parts: dict[str, int] = {}
        for row, flag in zip(rows, flags, strict=True):
            parts[part_of(row) or "all"] = parts.get(part_of(row) or "all", 0) + flag
        accuracy = wilson(fmean(flags), len(rows))
        result[name] = {
            "accuracy": rounded(accuracy.value),
            "interval": [rounded(accuracy.low), rounded(accuracy.high)],
            "parts": parts,
            "of_rows": "".join("01"[flag] for flag in flags),
        }
    return result


def rounded(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.4f}")


def measurement_of(args: ToolExpanderConfig, rollouts: int, rows: Sequence[Row], eval_rows: Sequence[Row]) -> dict:
    """Identifies a measurement, without paths of the machine."""
    source = resolve(args.model or "tiny")
    named = "/".join(Path(source.place).parts[-2:]) if source.kind in ("folder", "adapter") else Path(source.place).name
    return {
        "model": named,
        "rollouts": rollouts,
        "training_rows": digest(rows),
        "held_out_rows": digest(eval_rows),
        **{name: getattr(args, name) for name in SETTINGS},
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--rollouts", type=number(int, 1, 4096), default=10, help="rollouts of each training row (default: 10)"
    )
    own, flags = parser.parse_known_args(argv)
    own.output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as nowhere:
        args = parse_train([*flags, "--output_dir", f"{nowhere}/run"])
        rows, eval_rows = load_rows(args)
        measurement = measurement_of(args, own.rollouts, rows, eval_rows)
        answers = Answers(own.output.with_suffix(".answers.jsonl"), measurement)
        if len(answers.of_rows) < len(rows) + len(eval_rows):
            answer(ToolExpanderTrainer(args.model or "tiny", None, args, rows, eval_rows), answers, own.rollouts)
    result = measurement | {
        "train": on_training_rows(answers.of_rows[: len(rows)]),
        "held_out": on_held_out_rows(eval_rows, answers.of_rows[len(rows) :]),
    }
    write_atomically(own.output, json.dumps(result) + "\n")
    print(f"{own.output}: {result['train']['hard']} of {len(rows)} training rows are hard")


if __name__ == "__main__":
    main()
