"""A reader who follows a page from top to bottom: runs its Python, types its commands, in a folder with stand-ins."""

from __future__ import annotations

import ast
import functools
import glob
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.docs.markdown import ROOT, Page
from tests.docs.parsing import all_flags, file_of, flags_of, parse_module, parse_pip, parse_pytest, parse_toolx
from toolx_kernels.cli.commands import COMMANDS, main
from toolx_kernels.cli.recipes import recipe_names
from toolx_kernels.cli.train import parse_train
from toolx_kernels.errors import InputError
from toolx_kernels.models.tiny import is_tiny
from toolx_kernels.toolcall.rows import check_row
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.rows import BUILT_IN
from toolx_kernels.train.run.folder import RunFolder

# what stands for something else in a command, and for what
PLACEHOLDERS = {
    "NAME": "grpo", "FILE": "file.json", "FOLDER": "folder", "RECORD": "builtin", "GROUP": "loss",
    "<command>": "doctor",
}  # fmt: skip
# what a Python block may need that has a stand-in; a block that needs anything else is not run
HUB_MODEL = "a hub model"
# added to commands that are run, so that they take no time
AT_TOY_SIZE = {"eval": ["--eval_rows", "2", "--max_completion_length", "8"]}
# settings that a stand-in run does not take from the command that it is said to be of, since toolx eval would use them
OF_THE_TOY = (
    "model", "dataset", "tool_format", "chat_template_kwargs", "date", "max_completion_length", "self_exemplify",
)  # fmt: skip
# flags of the runs that a reader is taken to have where nothing above trains any, by the names of their folders
RUNS = {name: ["--config", name] for name in recipe_names()} | {"rows": ["--dataset", "rows.jsonl"]}
COMMAND = re.compile(r"(?:\w+=\S+ )*(?:\.venv/bin/|\./)?(toolx|make|python3?|pytest|pip|git|\.ci/run)(?: |$)")
ASSIGNMENT = re.compile(r"([A-Za-z_]+)=(.*)", re.DOTALL)


def command_in(text: str) -> bool:
    return COMMAND.match(text.strip().removeprefix("$ ")) is not None


class Reader:
    """Works in the present folder, where ``rows.jsonl`` is the reader's dataset. ``toy_run()`` gives the folder of a
    small run, a copy of which stands for each run that a page trains.

    The commands of a fence are typed one after the other: none may train into the folder of one before, and once one
    has trained, those that follow find no other runs than the page's. Where a fence trains nothing, the reader is taken
    to have ``runs/<recipe>`` and ``runs/rows``.
    """

    def __init__(self, toy_run: Callable[[], Path]):
        self.toy_run = toy_run
        self.trained: set[Path] = set()  # run folders of this fence

    # ---- a page

    def follow(self, page: Page) -> dict[str, Any]:
        """Does what the fences of ``page`` say, in order; returns the names that its Python defines."""
        names: dict[str, Any] = {"__name__": page.path.stem}
        for fence in page.fences:
            where = f"{page.name}:{fence.line}"
            try:
                if fence.language == "python":
                    with self.hub() if fence.needs == HUB_MODEL else nullcontext():
                        self.python(fence.text, names, where, run=fence.needs in ("", HUB_MODEL))
                elif fence.language == "sh":
                    self.shell(fence.text)
                elif fence.language == "yaml":
                    Path("page.yaml").write_text(fence.text, encoding="utf-8")
                    parse_train(["--config", "page.yaml"])
                elif fence.language == "json":
                    self.json(fence.text)
                else:
                    assert fence.language in ("", "text"), (
                        f"a fence of {fence.language!r}: sh, python, yaml, json or text?"
                    )
                    hidden = [line for line in fence.text.splitlines() if command_in(line)]
                    assert not hidden, f"call the fence of {hidden[0]!r} sh"
            except Exception as error:
                kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
                raise AssertionError(f"{where}: {kind}{error}") from error
        return names

    @contextmanager
    def hub(self) -> Iterator[None]:
        """Makes the toy run's model and tokenizer those of every name on the hub."""
        checkpoint = RunFolder(self.toy_run()).latest_checkpoint()
        with ExitStack() as patches:
            for each in (AutoTokenizer, AutoModelForCausalLM):
                there = partial(each.from_pretrained, checkpoint)
                patches.enter_context(patch.object(each, "from_pretrained", lambda *_, there=there, **__: there()))
            yield

    def python(self, text: str, names: dict[str, Any], where: str, run: bool) -> None:
        """Runs a block. Of one that is not to be run, what it imports of this package must exist."""
        tree = ast.parse(text, where)
        if not run:
            imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
            tree.body = [node for node in imports if "toolx_kernels" in ast.unparse(node)]
        exec(compile(tree, where, "exec"), names)

    def json(self, text: str) -> None:
        """One value, or one a line; rows of a dataset are checked as such."""
        try:
            values = [json.loads(text)]
        except ValueError:
            values = [json.loads(line) for line in text.splitlines() if line]
        for index, value in enumerate(values):
            if isinstance(value, dict) and "prompt" in value:
                check_row(value, "the page", index)

    def shell(self, text: str) -> None:
        self.trained = set()
        for line in text.replace("\\\n", " ").splitlines():
            try:
                for words in split(line, ("&&", ";")):
                    self.command(words, run=True)
            except (AssertionError, InputError) as error:
                raise AssertionError(f"`{line.strip()}`: {error}") from error

    # ---- a command

    def command(self, words: Sequence[str], run: bool) -> None:
        """Checks a command; with ``run`` those of toolx that read a run, a dataset or a config are run as well."""
        words = [PLACEHOLDERS.get(word, word) for word in words]
        while words and (variable := ASSIGNMENT.fullmatch(words[0])):
            assert variable[1] in known_variables(), f"nothing reads the variable {variable[1]}"
            words = words[1:]
        first, rest = words[0].removeprefix(".venv/bin/").removeprefix("./"), words[1:]
        if first == "toolx":
            self.toolx(rest, run)
        elif first == "make":
            for line in make(*rest):
                self.command(line, run=False)
                if run and "train" in line[1:2]:
                    self.train(parse_train(line[2:]))
        elif first in ("python", "python3"):
            self.python_command(rest, run)
        elif first == "pytest":
            parse_pytest(rest)
        elif first == "pip":
            parse_pip(rest)
        elif first == "export":
            assert rest and all(ASSIGNMENT.fullmatch(word) for word in rest), "export what?"
            assert not (unknown := {word.partition("=")[0] for word in rest} - known_variables()), unknown
        elif first == ".ci/run":
            assert (ROOT / first).exists() and not rest
        else:
            known = (["git", "clone"], ["cd"], ["source", ".venv/bin/activate"])
            assert any([first, *rest][: len(each)] == each for each in known), f"unknown kind of command {first!r}"

    def toolx(self, words: list[str], run: bool) -> None:
        words = [found for word in words for found in (sorted(glob.glob(word)) if run and "*" in word else [word])]
        name, flags = words[0], words[1:]
        if flags[-1:] == ["..."] and not words[-2].startswith("--"):  # and other flags
            flags.pop()
        known = {word for word in flags if word.startswith("--")}
        if name in COMMANDS and known == set(flags) and not run:  # in prose, where values may be left out
            assert not (unknown := known - flags_of(name)), f"toolx {name} has no {unknown}"
            return
        if run and name in ("eval", "compare", "plan", "doctor") and self.is_here(name, flags):
            toy = AT_TOY_SIZE.get(name, [])
            said = StringIO()
            with redirect_stdout(said), redirect_stderr(said):
                code = main([name, *flags, *toy])
            assert code in ((0, 1) if name == "plan" else (0,)), said.getvalue().strip().splitlines()[-1]
            return
        parse_toolx([name, *flags])
        if name == "train" and "--help" not in known:
            config = parse_train(flags)
            if run:
                self.train(config)

    def is_here(self, name: str, flags: list[str]) -> bool:
        """Whether nothing has to be downloaded for a command; its runs then stand where it looks for them."""
        parse_toolx([name, *flags])
        values = [word for word in flags if not word.startswith("--")]
        for value in values:
            kind, _, recipe = value.rpartition("/")
            if kind == "runs" and recipe in RUNS and not self.trained and not Path(value).exists():
                self.stand_in(parse_train(["--output_dir", value, *RUNS[recipe]]))
        return not any(is_elsewhere(value) for value in values)

    def python_command(self, words: list[str], run: bool) -> None:
        if words[:1] == ["-m"] and words[1] in ("pytest", "pip"):
            {"pytest": parse_pytest, "pip": parse_pip}[words[1]](words[2:])
        elif words[:1] == ["-m"] and (words[2:] or run):
            parse_module(words[1], words[2:])
        elif words[:1] == ["-m"]:  # in prose, where arguments may be left out
            file_of(words[1])
        elif words[:1] == ["-c"]:
            ast.parse(words[1])
        else:
            assert len(words) == 1 and (ROOT / words[0]).is_file(), f"python {' '.join(words)}: there is no such file"

    def train(self, config: ToolExpanderConfig) -> None:
        folder = Path(config.output_dir)
        if folder not in self.trained and not config.resume:
            shutil.rmtree(folder, ignore_errors=True)  # of another fence
        if folder.exists() or not config.resume:
            RunFolder(folder).check(config)
        self.stand_in(config)
        self.trained.add(folder)

    def stand_in(self, config: ToolExpanderConfig) -> None:
        """A run folder where one with this config would be."""
        folder = Path(config.output_dir)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.toy_run(), folder)
        toy = yaml.safe_load((folder / "config.yaml").read_text())
        settings = config.to_dict() | {name: toy[name] for name in OF_THE_TOY}
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))

    # ---- prose

    def spans(self, page: Page) -> None:
        """Checks the commands and the flags that stand in backticks."""
        for span in page.spans:
            try:
                if command_in(span) and " " in span:
                    for words in split(span, ("&&",)):
                        self.command(words, run=False)
                else:
                    flags = re.findall(r"(?<![\w-])--[a-z][\w-]*", span)
                    assert not (unknown := set(flags) - all_flags()), f"no parser has {unknown}"
            except Exception as error:
                raise AssertionError(f"{page.name}: `{span}`: {error}") from error


def split(line: str, separators: Sequence[str]) -> list[list[str]]:
    """The commands of a line, each as its words; ``<...>`` is one word."""
    line = re.sub(r"<[\w ]+>", lambda place: place[0].replace(" ", "-"), line)
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if word in separators:
            commands.append([])
        else:
            assert not re.fullmatch(r"[;&|<>]+", word), f"{word} in a command: only {separators} are read"
            commands[-1].append(word)
    return [words for words in commands if words]


def is_elsewhere(value: str) -> bool:
    """Whether a word of a command names a model or a dataset that is not on every machine."""
    here = is_tiny(value) or value in BUILT_IN or Path(value).exists()
    hub = re.fullmatch(r"(?!runs/)[A-Za-z][\w.-]*/[\w.-]+", value)
    return not here and bool(hub or "..." in value or value.startswith(("bfcl:", "seal-tools:", "smollm2")))


@functools.cache
def make(*words: str) -> list[list[str]]:
    """What make would do with ``ARGS``, and the ``toolx`` lines of what it would do.

    Raises AssertionError for a target or a variable that the Makefile does not have.
    """
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    given = dict(word.split("=", 1) for word in words if "=" in word)
    assert not (unknown := {name for name in given if f"$({name})" not in makefile}), f"no variable {unknown}"
    command = ["make", "-n", "-o", "setup", "-o", "models", *words]
    environment = {"PATH": os.environ["PATH"]}  # not the ARGS of a make that runs the tests
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]
    asked = given.get("ARGS")
    lines = [line for line in done.stdout.splitlines() if ".venv/bin/toolx " in line or (asked and asked in line)]
    return [words for line in lines for words in split(line, ())]


@functools.cache
def known_variables() -> frozenset[str]:
    """Environment variables that something here reads."""
    files = [ROOT / name for name in ("Makefile", "setup.py", "tests/conftest.py")]
    paths = [*files, *(path for folder in ("toolx_kernels", "bench") for path in (ROOT / folder).rglob("*.py"))]
    return frozenset(re.findall(r"\b[A-Z][A-Z_]{2,}\b", "\n".join(path.read_text(encoding="utf-8") for path in paths)))
