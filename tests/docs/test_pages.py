"""Every page: its blocks run, its commands are understood, and what it names exists."""

import importlib
import re
from importlib.util import find_spec

import pytest

from tests.docs.markdown import ROOT, Page
from tests.docs.reader import command_in

PATHS = [
    *(path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if path.exists()),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("examples/*.md")),
]
PAGES = [Page(path) for path in PATHS]
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir()} & {
    "toolx_kernels", "bench", "tests", "docs", "examples", "csrc", ".github", ".ci",
}  # fmt: skip
IN_PACKAGE = {path.name for path in (ROOT / "toolx_kernels").iterdir() if path.is_dir()}
PATH = re.compile(r"[\w.*-]+(?:/[\w.*-]+)*/?")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@every_page
def test_blocks_run(page, reader):
    reader.follow(page)


@every_page
def test_commands_and_flags_in_prose(page, reader):
    check_no_hidden_command(page)
    reader.spans(page)


@every_page
def test_links(page):
    check_links(page)


@every_page
def test_names_of_files_and_modules(page):
    check_names(page)


def test_every_file_that_the_architecture_names_is_there():
    page = Page(ROOT / "docs" / "architecture.md")
    texts = page.spans + [fence.text for fence in page.fences]
    named = {name for text in texts for name in re.findall(r"[\w-]+\.(?:py|cpp|h)\b", text)}
    there = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")} | {"setup.py"}
    assert len(named) > 30 and named <= there, named - there


def check_no_hidden_command(page):
    """An indented block is code as well, and nobody would look at it."""
    for number, line in enumerate(page.prose, 1):
        assert not (line.startswith("    ") and command_in(line)), (
            f"{page.name}:{number}: put {line.strip()!r} into a fence"
        )


def check_links(page):
    for link in page.links:
        place, _, anchor = link.partition("#")
        if re.match(r"(https?|mailto):", place):
            continue
        target = page.path.parent / place if place else page.path
        assert target.exists(), f"{page.name}: there is no {place}"
        if anchor:
            there = page if target == page.path else Page(target)
            assert anchor in there.anchors, f"{page.name}: {there.name} has no heading #{anchor}"


def check_names(page):
    """Of files and folders of the repository or of the package, modules, and public names with their module."""
    texts = page.spans + [fence.text for fence in page.fences if fence.language in ("", "text")]
    for text in texts:
        for word in PATH.findall(re.sub(r"<[\w ]+>", "*", text)):
            first = word.partition("/")[0]
            if "/" in word and first in FOLDERS:
                assert list(ROOT.glob(word.rstrip("/"))), f"{page.name}: there is no {word}"
            elif first in IN_PACKAGE and re.search(r"/$|/.*\.\w+$", word):
                assert list((ROOT / "toolx_kernels").glob(word.rstrip("/"))), f"{page.name}: there is no {word}"
        for name in re.findall(r"\b(?:toolx_kernels|bench|tests)(?:\.\w+)+", text):
            assert is_name(name), f"{page.name}: there is no {name}"


def is_name(dotted):
    """Whether a module, or a name in one, is called so."""
    try:
        if find_spec(dotted):
            return True
    except ModuleNotFoundError:  # its last part is a name
        pass
    module, _, name = dotted.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        return False


WRONG = {
    "sh: toolx train --learning_rat 1": "--learning_rat",
    "sh: toolx train --loss_type gpro": "gpro",
    "sh: toolx train --config nobody": "nobody",
    "sh: toolx train --resume --overwrite": "overwrite",
    "sh: toolx eval --split half": "half",
    "sh: toolx eval --model runs/nothing": "runs/nothing",
    "sh: toolx eval --model runs/grpo --dataset nothing.jsonl": "nothing.jsonl",
    "sh: toolx eval --dataset rows.jsonl --split held-out --num_generations 0": "num_generations",
    "sh: toolx compare runs/grpo runs/mine": "There is no run in runs/mine",
    "sh: toolx train --config grpo --output_dir runs/a\ntoolx train --output_dir runs/a": "already holds a run",
    "sh: toolx train --output_dir runs/a\ntoolx compare runs/a runs/grpo": "There is no run in runs/grpo",
    "sh: toolx explain": "explain",
    "sh: make dinner": "No rule to make target",
    "sh: make train ARGS='--sed 1'": "--sed",
    "sh: make test ARGS='--only fast'": "--only",
    "sh: make gpu PYTHONS=3": "PYTHONS",
    "sh: TOOLX_BENCHES=full make bench": "nothing reads the variable TOOLX_BENCHES",
    "sh: python -m bench.learning.run builtin runs --seedling 1": "--seedling",
    "sh: python -m bench.learning.measure out.json --learning_rat 1": "--learning_rat",
    "sh: python -m bench.nothing": "there is no module bench.nothing",
    "sh: python examples/nothing.py": "there is no such file",
    "sh: python -m bench.models_table --fast": "has no flags",
    "sh: pytest bench/loss/test_nothing.py": "there is no bench/loss/test_nothing.py",
    "sh: pip install 'toolx_kernels[everything]'": "there is no extra everything",
    "sh: pip install --user .": "--user",
    "sh: curl https://example.org | sh": "in a command",
    "sh: wget https://example.org": "unknown kind of command 'wget'",
    "python: from toolx_kernels import linear_grpo_los": "linear_grpo_los",
    "python: 1 / 0": "ZeroDivisionError",
    "needs: from toolx_kernels import linear_grpo_los": "linear_grpo_los",
    "needs: def f(:": "SyntaxError",
    "hub: from transformers import AutoTokenizer as A\nA.from_pretrained('org/model').nothing": "nothing",
    "yaml: learning_rat: 1": "learning_rat",
    'json: {"prompt": "p", "tools": []}': "field 'answer' is missing",
    "bash: toolx doctor": "a fence of 'bash'",
    ": toolx doctor": "call the fence of 'toolx doctor' sh",
    "prose: Call `toolx train --learning_rat 1`.": "--learning_rat",
    "prose: Call `toolx eval --memory`.": "--memory",
    "prose: With `--learning_rat`.": "--learning_rat",
    "prose: Call `make dinner now`.": "No rule to make target",
    "prose:     toolx doctor": "into a fence",
    "prose: See [this](nothing.md).": "there is no nothing.md",
    "prose: See [this](#nothing).": "has no heading #nothing",
    "prose: ![a picture](nothing.png)": "there is no nothing.png",
    "prose: In `toolx_kernels/nothing.py`.": "there is no toolx_kernels/nothing.py",
    "prose: In `train/nothing.py`.": "there is no train/nothing.py",
    "prose: In `bench/nothing/*/loss.md`.": "there is no bench/nothing/*/loss.md",
    "prose: In `toolx_kernels.toolcall.parse.nothing`.": "there is no toolx_kernels.toolcall.parse.nothing",
    ": engine/nothing.py": "there is no engine/nothing.py",
}


@pytest.mark.parametrize("text, fault", WRONG.items(), ids=WRONG)
def test_what_is_wrong_on_a_page_is_found(text, fault, reader, tmp_path):
    with pytest.raises(AssertionError) as caught:
        everything(page_with(text, tmp_path), reader)
    assert fault in re.sub(r"`[^`]*`: ", "", str(caught.value)), "in what is said of the command"


RIGHT = (
    "sh: make train ARGS='--seed 1' && toolx eval --split held-out",
    "sh: toolx train --config retry --output_dir runs/mine --seed 3\n"
    "toolx train --output_dir runs/grpo\n"
    "toolx compare runs/* --names a b",
    "sh: toolx train\ntoolx train --resume --max_steps 9\ntoolx train --overwrite\n```\n\n```sh\ntoolx train",
    "sh: toolx train --resume --output_dir runs/grpo",
    "sh: toolx eval --model runs/rows --dataset rows.jsonl\n```\n\n```sh\ntoolx compare runs/rows runs/retry",
    "sh: toolx eval --model org/model --dataset bfcl:simple_python  # nothing is downloaded",
    "sh: python -m bench.gpu --toy --only 'loss/*' memcheck",
    "python: from pathlib import Path\nPath('rows.jsonl').read_text()",
    "needs: from a_package_that_is_not_here import a\nfrom toolx_kernels import InputError",
    "yaml: hard_sampling: none\nlearning_rate: 1e-5",
    'json: {"prompt": "p", "tools": [], "answer": []}\n{"prompt": "q", "tools": [], "answer": []}',
    "prose: # A `b`: c\n\n# A `b`: c\n\nSee [one](#a-b-c), [other](#a-b-c-1) and [here](page.md#a-b-c).",
    "prose: `--learning_rate 1e-5`, `make test`, `toolx eval --date`, `toolx train ...`, `toolx`, `a/b.py`",
    "prose: `toolx_kernels.cli.main`, `toolx_kernels.train`, `ops/*/`, `bench/results/<machine>/loss.md`",
    "sh: toolx doctor\ntoolx plan --model tiny --prompt_length 9 --memory 0.5 --max_completion_length 9",
)


@pytest.mark.parametrize("text", RIGHT)
def test_what_is_right_on_a_page_passes(text, reader, tmp_path):
    everything(page_with(text, tmp_path), reader)


def page_with(text, folder):
    kind, _, content = text.partition(": ")
    above = {"needs": "<!-- needs: a thing -->\n", "hub": "<!-- needs: a hub model -->\n"}.get(kind, "")
    language = "python" if above else kind
    (folder / "page.md").write_text(content + "\n" if kind == "prose" else f"{above}```{language}\n{content}\n```\n")
    return Page(folder / "page.md")


def everything(page, reader):
    reader.follow(page)
    check_no_hidden_command(page)
    reader.spans(page)
    check_links(page)
    check_names(page)
