"""Tables and reports of one kind of benchmark: CSV, Markdown with the absent providers, and plots."""

from __future__ import annotations

import argparse
import ast
import csv
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolx_kernels.pictures import write_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parents[1] / "results"
DTYPES = {"bfloat16": "bf16", "float32": "fp32"}
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the CSV, and of the Markdown table where it has a ``heading``; ``text`` formats its values."""

    name: str
    heading: str = ""
    text: Callable[[Any], str] = str


@dataclass(frozen=True, slots=True)
class Report:
    """One kind of benchmark: its measurements are what ``extra_info`` holds under ``name``.

    case       the columns that name a case; "provider" and ``columns`` follow
    rows_of    from the measurements to a row for each case and provider; keys without a column are dropped
    case_name  a case in words
    pictures   the function that draws each picture, by its name
    notes      lines between the table and the list of absent providers
    """

    name: str
    title: str
    legend: str
    case: Sequence[str]
    columns: Sequence[Column]
    rows_of: Callable[[Sequence[Mapping]], list[Row]]
    case_name: Callable[[Row], str]
    pictures: Callable[[list[Row]], dict[str, Callable[[], Figure]]]
    notes: Callable[[list[Row]], list[str]] = lambda rows: []

    def measurements(self, record: Mapping) -> list[dict]:
        """The measurements in ``record``, the parsed JSON of pytest-benchmark, which also holds other kinds."""
        return [b["extra_info"][self.name] for b in record["benchmarks"] if self.name in b.get("extra_info", {})]

    def rows(self, record: Mapping) -> list[Row]:
        names = [*self.case, "provider", *(column.name for column in self.columns)]
        return [{name: row.get(name) for name in names} for row in self.rows_of(self.measurements(record))]

    def markdown(self, record: Mapping, rows: list[Row]) -> str:
        machine = record["machine_info"]
        names = ("cores", "threads", "python", "cuda", "torch", "triton")
        facts = {name: machine[name] for name in names if name in machine} | self.measurements(record)[0]["versions"]
        words = ", ".join(f"{name} {value}" for name, value in facts.items())
        lines = [f"# {self.title} on {machine['device']}", "", f"{record['datetime'][:10]}; {words}.", "", self.legend]
        shown = [column for column in self.columns if column.heading]
        lines += table(
            ["case", "provider", *(column.heading for column in shown)],
            (
                [name if at == 0 else "", named(row), *(text_of(row[column.name], column.text) for column in shown)]
                for name, case in named_cases(rows, self.case_name)
                for at, row in enumerate(case)
            ),
        )
        return "\n".join([*lines, *self.notes(rows), *absent(rows, self.case_name)]) + "\n"

    def write(self, record: Mapping, results: Path = RESULTS) -> Path:
        """Writes <name>.csv, <name>.md and the plots into the folder of the measured machine, and returns it."""
        rows = self.rows(record)
        folder = results / record["machine_info"]["slug"]
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{self.name}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        (folder / f"{self.name}.md").write_text(self.markdown(record, rows), encoding="utf-8")
        self.draw(rows, folder)
        return folder

    def draw(self, rows: list[Row], folder: Path) -> None:
        for name, drawn in self.pictures(rows).items():
            write_picture(folder / name, drawn)

    def main(self, argv: Sequence[str] | None = None) -> int:
        """The command line: reads the JSON, writes the report and prints it."""
        program = f"python -m bench.{self.name}.report"
        parser = argparse.ArgumentParser(prog=program, description=f"Writes bench/results/<machine>/{self.name}.*")
        parser.add_argument(
            "file", type=Path, help="what pytest wrote for --benchmark-json, or a .csv whose pictures are drawn anew"
        )
        path = parser.parse_args(argv).file
        try:
            if path.suffix == ".csv":
                self.draw(rows_in(path), path.parent)
                return 0
            record = json.loads(path.read_text(encoding="utf-8"))
            measured = self.rows(record)
        except (OSError, ValueError, KeyError) as error:
            print(f"{program}: cannot use {path} ({error}): write it with pytest --benchmark-json.", file=sys.stderr)
            return 2
        if not measured:
            print(f"{path} holds no measurement of the {self.name}, so its report stays as it is.")
            return 0
        print((self.write(record) / f"{self.name}.md").read_text(encoding="utf-8"))
        return 0


def rows_in(path: Path) -> list[Row]:
    """The rows of a report's CSV."""

    def value(text: str) -> Any:
        try:
            return ast.literal_eval(text) if text else None
        except (ValueError, SyntaxError):
            return text

    with open(path, newline="", encoding="utf-8") as file:
        return [{name: value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def ratio(value: float | None, divisor: float | None) -> float | None:
    return round(value / divisor, 3) if value and divisor else None


def text_of(value: Any, text: Callable[[Any], str]) -> str:
    return "" if value is None else text(value)


def named(row: Row) -> str:
    return row["provider"] + (" (**wrong**)" if row.get("wrong") else "")


def table(headings: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    rows = [headings, ["---"] * len(headings), *body]
    return ["| " + " | ".join(row) + " |" for row in rows]


def named_cases(rows: Iterable[Row], case_name: Callable[[Row], str]) -> list[tuple[str, list[Row]]]:
    """The rows of the providers that ran, by the names of their cases."""
    present = (row for row in rows if not row["absent"])
    return [(name, list(case)) for name, case in groupby(present, key=case_name)]


def absent(rows: Sequence[Row], case_name: Callable[[Row], str]) -> list[str]:
    """Lines on absent providers with the reasons; they name the case if a provider ran in others."""
    reasons = {(r["provider"], r["absent"]): case_name(r) for r in rows if r["absent"]}
    everywhere = {r["provider"] for r in rows} - {r["provider"] for r in rows if not r["absent"]}
    lines = [
        f"- {provider}{'' if provider in everywhere else f' ({case})'}: {reason}"
        for (provider, reason), case in reasons.items()
    ]
    return ["", "Absent:", "", *lines] if lines else []
