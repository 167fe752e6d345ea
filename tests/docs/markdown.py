"""Pages of Markdown, as far as the tests read them: fences, code spans, links, headings and tables."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r" *```([\w-]*) *")
NEEDS = re.compile(r" *<!-- needs: (.+) -->")
SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")
HEADING = re.compile(r"#{1,6} (.+)")


class Fence(NamedTuple):
    line: int  # of the page, where its text begins
    language: str
    needs: str  # what the comment above it says that it needs; "" without one
    text: str


class Page:
    """The page at ``path``.

    fences   in order
    prose    the text without fences; its lines are those of the page
    """

    def __init__(self, path: Path):
        self.path = path
        self.fences: list[Fence] = []
        self.prose: list[str] = []
        lines = path.read_text(encoding="utf-8").splitlines()
        opened = None
        for number, line in enumerate(lines, 1):
            fence = FENCE.fullmatch(line)
            if opened is None and fence:
                needs = NEEDS.fullmatch(lines[number - 2]) if number > 1 else None
                opened = (number, fence[1], needs[1] if needs else "")
            elif opened is not None and fence:
                start, language, needs = opened
                self.fences.append(
                    Fence(start + 1, language, needs, textwrap.dedent("\n".join(lines[start : number - 1])))
                )
                opened = None
            self.prose.append("" if fence or opened else line)
        assert opened is None, f"{self.name}:{opened[0]}: this fence is never closed"

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT)) if self.path.is_relative_to(ROOT) else self.path.name

    @property
    def spans(self) -> list[str]:
        """What stands in backticks, each as one line."""
        return spans_of("\n".join(self.prose))

    @property
    def links(self) -> list[str]:
        text = SPAN.sub("", "\n".join(self.prose))
        return [markdown or html for markdown, html in LINK.findall(text)]

    @property
    def anchors(self) -> list[str]:
        """What GitHub calls the headings; of equal ones the second is ``name-1``."""
        found: list[str] = []
        for heading in filter(None, map(HEADING.fullmatch, self.prose)):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])
            name = re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-")
            earlier = sum(one == name or re.fullmatch(rf"{re.escape(name)}-\d+", one) is not None for one in found)
            found.append(f"{name}-{earlier}" if earlier else name)
        return found

    def section(self, words: str) -> list[str]:
        """The lines under the heading that holds ``words``, until the next heading."""
        lines = iter(self.prose)
        assert any(HEADING.fullmatch(line) and words in line for line in lines), f"{self.name}: no heading {words!r}"
        found: list[str] = []
        for line in lines:
            if HEADING.fullmatch(line):
                break
            found.append(line)
        return found


def spans_of(text: str) -> list[str]:
    paragraphs = re.split(r"\n\s*\n|\n(?=\|)", text)
    found = [span for paragraph in paragraphs for _, span in SPAN.findall(paragraph)]
    return [" ".join(span.replace("\\|", "|").split()) for span in found]


def rows_of(lines: list[str]) -> list[list[str]]:
    """The cells of the tables in ``lines``, row by row, without headings."""
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if line.startswith("|")]
    rules = [at for at, row in enumerate(cells) if all(re.fullmatch(r":?-+:?", cell) for cell in row)]
    return [row for at, row in enumerate(cells) if at not in rules and at + 1 not in rules]
