"""The table of supported versions: ratings of installed versions, and files that must agree with the table."""

import re
from pathlib import Path

import pytest

from toolx_kernels.versions import OPTIONAL, SUPPORTED, Supported, standing

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "installed, words",
    [
        ("2.9.1", "needs 2.10 or newer"),
        ("absent", "needs 2.10 or newer"),
        ("2.10.0+cu130", "supported (tested: 2.11, 2.13)"),
        ("2.11.0+cu130", "tested"),
        ("2.12.1", "supported (tested: 2.11, 2.13)"),
        ("2.13.2+cpu", "tested"),
        ("2.14.0.dev20261101", "newer than tested (2.13)"),
        ("3.0", "newer than tested (2.13)"),
    ],
)
def test_standing(monkeypatch, installed, words):
    monkeypatch.setitem(SUPPORTED, "torch", Supported("2.10", ("2.11", "2.13")))
    assert standing("torch", installed) == words


def test_requirements_pins_checks_and_words_agree_with_the_table():
    files = ("pyproject.toml", "constraints.txt", "Makefile", "README.md", "docs/install.md")
    texts = {name: (ROOT / name).read_text() for name in files}
    install = " ".join(texts["docs/install.md"].split())
    python, triton = SUPPORTED["Python"], SUPPORTED["triton"]
    for name in ("torch", "triton", "transformers"):
        assert f'"{name}>={SUPPORTED[name].oldest}' in texts["pyproject.toml"]
    for name in ("torch", "transformers"):
        assert f"\n{name}=={SUPPORTED[name].tested[-1]}." in texts["constraints.txt"]
    for name, (oldest, tested) in OPTIONAL.items():
        assert texts["pyproject.toml"].count(f'"{name}>={oldest}') == 2, "in the extra of its own, and in test"
        assert f"\n{name}=={tested[-1]}." in texts["constraints.txt"]
    assert f"triton=={triton.tested[-1]}." in texts["Makefile"]
    assert f"triton {triton.tested[-1]}." in texts["constraints.txt"]
    assert f'requires-python = ">={python.oldest}"' in texts["pyproject.toml"]
    assert f'target-version = "py{python.oldest.replace(".", "")}"' in texts["pyproject.toml"]
    assert f'"py_limited_api": "cp{python.oldest.replace(".", "")}"' in (ROOT / "setup.py").read_text()
    assert f"sys.version_info < ({python.oldest.replace('.', ', ')})" in texts["Makefile"]
    assert f"Python {python.tested[-1]}" in texts["constraints.txt"]
    assert f'python-version: "{python.tested[-1]}"' in (ROOT / ".github/workflows/ci.yml").read_text()
    pre_commit = (ROOT / ".pre-commit-config.yaml").read_text()
    assert f"\nruff=={re.search(r'rev: v(.*)', pre_commit)[1]}\n" in texts["constraints.txt"]
    words = [f"{name} {oldest}+ (tested: {', '.join(tested)})" for name, (oldest, tested) in SUPPORTED.items()]
    assert f"Supported: {', '.join(words)}." in install
    words = [f"{name} {oldest}+ (tested: {', '.join(tested)})" for name, (oldest, tested) in OPTIONAL.items()]
    assert f"Optional: {', '.join(words)}." in install
    assert set(re.findall(r"Python (\d\.\d+)\+", texts["README.md"] + install)) == {python.oldest}
