"""The repository's text against its code: docstring examples, modules on command lines, targets of make.

``tests/docs`` tests the pages of the documentation.
"""

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WITH_EXAMPLES = [path for path in (ROOT / "toolx_kernels").rglob("*.py") if ">>> " in path.read_text()]
WITH_COMMANDS = [ROOT / "Makefile", *ROOT.glob("bench/*/*.py")]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.stem)
def test_examples_in_docstrings(path):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_on_command_lines(path):
    for module in re.findall(r"(?:-m|from) ((?:bench|tests|toolx_kernels)\b[\w.]*)", path.read_text()):
        assert importlib.util.find_spec(module.rstrip(".")), module


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)", makefile, re.MULTILINE)[1].split()
    assert re.findall(r"^([a-z-]+):.*  ## \S.*", makefile, re.MULTILINE) == targets
