"""Supported versions of Python and of the dependencies: the one table for installation, checks and docs."""

import re
from importlib import metadata
from typing import NamedTuple


class Supported(NamedTuple):
    """Release series, such as ``2.11``."""

    oldest: str
    tested: tuple[str, ...]  # that the tests were run with, oldest first


SUPPORTED = {
    "Python": Supported("3.10", ("3.11",)),
    "torch": Supported("2.11", ("2.11", "2.13")),
    "triton": Supported("3.6", ("3.6", "3.9")),
    "transformers": Supported("5.17", ("5.17",)),
}

# not required
OPTIONAL = {
    "peft": Supported("0.19", ("0.19", "0.21")),
    "torchao": Supported("0.18", ("0.18",)),
}


def standing(name: str, installed: str) -> str:
    """Compares ``installed``, such as ``2.11.0+cu130`` or ``absent``, with the supported versions, in words."""
    oldest, tested = (SUPPORTED | OPTIONAL)[name]
    series = _series(installed)
    if series < _series(oldest):
        return f"needs {oldest} or newer"
    if series > _series(tested[-1]):
        return f"newer than tested ({tested[-1]})"
    return "tested" if series in map(_series, tested) else f"supported (tested: {', '.join(tested)})"


def version_of(package: str) -> str:
    """The version of an installed package, without importing it; ``absent`` if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def _series(version: str) -> tuple[int, int]:
    """(major, minor), or (0, 0) if ``version`` is not a version."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)
