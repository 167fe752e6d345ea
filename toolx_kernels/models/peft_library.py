"""The peft library: the check of its installed version, and its errors as InputErrors."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

import transformers
from packaging.version import InvalidVersion, Version
from transformers.integrations.peft import MIN_PEFT_VERSION

from toolx_kernels.errors import InputError, first_line, out_of_memory
from toolx_kernels.versions import SUPPORTED


def peft_fault() -> str | None:
    """What an adapter needs and this installation lacks, with the remedy; None if nothing. Does not import peft."""
    try:
        installed = metadata.version("peft")
    except metadata.PackageNotFoundError:
        installed = ""
    if not installed or importlib.util.find_spec("peft") is None:
        return "peft: pip install 'toolx_kernels[lora]'"
    try:
        if Version(installed) >= Version(MIN_PEFT_VERSION):
            return None
    except InvalidVersion:
        return (
            f"peft {MIN_PEFT_VERSION} or newer, but the installed one calls its version {installed!r}: "
            f"pip install --force-reinstall 'peft>={MIN_PEFT_VERSION}'"
        )
    tested = SUPPORTED["transformers"].tested[-1]
    newer = not transformers.__version__.startswith(f"{tested}.")
    return (
        f"peft {MIN_PEFT_VERSION} or newer with transformers {transformers.__version__}, but peft {installed} is "
        f"installed: pip install 'peft>={MIN_PEFT_VERSION}'"
        + newer
        * f", or if it is not released yet 'transformers=={tested}.*'"
    )


@contextmanager
def using_peft(user: str, failure: str, remedy: str, *, writing: bool = False) -> Iterator[None]:
    """Turns whatever peft, and transformers with it, raise in the block into an InputError of one sentence.

    Out-of-memory errors pass unchanged, and so do errors of the operating system if the block is ``writing``.

    Args:
        user: what needs peft, the start of the sentence "user needs peft".
        failure, remedy: parts of the sentence "failure (peft's error): remedy."

    Raises:
        InputError: peft is missing, too old for transformers, or raised an error.
    """
    if fault := peft_fault():
        raise InputError(f"{user} needs {fault}.")
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # adapter code may raise anything
        if out_of_memory(error) or (writing and isinstance(error, OSError)):
            raise
        raise InputError(f"{failure} ({type(error).__name__}: {first_line(error)}): {remedy}.") from error
