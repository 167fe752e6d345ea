"""Numbers on the command lines of ``bench``, with their bounds."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

from toolx_kernels.errors import short

Number = TypeVar("Number", int, float)


def number(kind: Callable[[str], Number], least: Number, most: Number) -> Callable[[str], Number]:
    """A ``type`` for argparse: an int or float from ``least`` to ``most``."""

    def read(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{short(text)} must be a number from {least:,} to {most:,}")
        return value

    return read


SEED = number(int, 0, 2**32 - 1)
WORKERS = number(int, 1, 256)
MINUTES = number(float, 0.0, 10_000.0)
