"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import unicodedata
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from toolx_kernels.errors import InputError, short


def expanded(name: str) -> str:
    """A name or path that a user gave, with the home folder in place of ``~`` or ``~user``, also after a comma or colon
    (``seal-tools:~/data``).

    Raises InputError, which begins with the name: it is empty, no file can have it, or there is no such user.
    """
    if not name.strip():
        raise InputError(f"{short(name)} is empty: give a name, or leave it out.")
    if odd := next((char for char in name if unicodedata.category(char) in ("Cc", "Cs")), None):
        kind = "a control character" if unicodedata.category(odd) == "Cc" else "not UTF-8 text"
        raise InputError(f"{short(name)} holds {odd!r}, which is {kind}: give a name without it.")
    return re.sub(r"(?<![^,:])(\s*)(~[^/,:]*)", lambda found: found[1] + _home(name, found[2]), name)


def _home(name: str, user: str) -> str:
    home = os.path.expanduser(user)
    if home == user:
        raise InputError(
            f"{short(name)} names the home folder {user}, and there is no such user: write ./{user} for a file."
        )
    return home


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces the contents of a file with ``content``; after a failure the file has its old or its new contents."""
    beside = path.with_name(path.name + ".part")
    try:
        with open(beside, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Waits until a file's contents, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_crc(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a folder to write into, which is renamed to ``path`` if the block succeeds and removed if it fails."""
    beside = path.with_name(f".{path.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        beside.rename(path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def check_new(path: Path) -> None:
    """Raises InputError if ``path`` is a file or a folder that is not empty."""
    if path.exists() and not path.is_dir():
        raise InputError(f"--output {path} is a file: name a new folder.")
    if path.is_dir() and any(path.iterdir()):
        raise InputError(f"--output {path} holds files already: name a new folder, or remove it first.")
