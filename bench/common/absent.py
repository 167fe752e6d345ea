"""Absent providers: the exception that says why, and one line for any other failure."""

from __future__ import annotations


class Absent(Exception):
    """The provider cannot run here; the message says why."""


def why_absent(package: str | None, error: Exception) -> str:
    """The reason why a provider cannot run, in one line."""
    if isinstance(error, Absent):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed: pip install {package}"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
