"""The lock of a run folder, so that only one process at a time writes to it.

The kernel holds it for the process that writes, and frees it when that process ends, however it ends. The text of the
file ``run.lock`` only says which process that is.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from datetime import datetime
from io import FileIO
from pathlib import Path

from toolx_kernels.errors import InputError

LOCK = "run.lock"
TRIES, PAUSE = 100, 0.01  # seconds between two tries; what another process does to the file meanwhile takes less


def gone(run: Path) -> InputError:
    return InputError(
        f"{run} was deleted or moved while the run wrote to it: put it back and pass --resume, or start a new run."
    )


def _open(path: str, flags: int) -> int:
    """Opens the lock's file; follows no link, whose target would be overwritten, and waits for no pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def check_free(run: Path) -> None:
    """Raises InputError if a process writes to the run folder: another one, or this one. Changes nothing."""
    try:
        with open(run / LOCK, "rb", buffering=0, opener=_open) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, so that those who look do not meet each other
            fcntl.flock(file, fcntl.LOCK_UN)
    except BlockingIOError:
        raise InputError(
            f"{run} is in use, {_holder(run / LOCK)} writes to it: wait until that ends or stop it, or choose another "
            "--output_dir."
        ) from None
    except OSError:  # there is none, or it cannot be locked: see ``RunLock``
        return


def _holder(path: Path) -> str:
    for _ in range(TRIES):
        try:
            told = json.loads(path.read_bytes())
            pid, host, since = told["pid"], told["host"], told["since"]
        except (OSError, ValueError, TypeError, KeyError, RecursionError):  # not written yet
            time.sleep(PAUSE)
            continue
        where = f" on {host}" if host != socket.gethostname() else ", this one," if pid == os.getpid() else ""
        return f"process {pid}{where} since {since}"
    return "another process"


class RunLock:
    """Context that holds the lock of a run folder, which must exist.

    A child forked inside does not hold it: it would keep the folder locked after the run has died. Where the file
    system has no locks, that is printed, and nothing is locked.

    Raises InputError if the folder is in use, as ``check_free`` does, or the lock's file cannot be written.
    """

    def __init__(self, run: Path):
        self.run, self.path = run, run / LOCK
        self._file: FileIO | None = None
        self._able = True  # whether the file system has locks

    def __enter__(self) -> RunLock:
        try:
            self._acquire()
        except OSError as error:
            self._drop()
            raise InputError(
                f"{self.path} cannot be written ({error.strerror}): mend that, or choose another --output_dir."
            ) from None
        except BaseException:
            self._drop()
            raise
        return self

    def __exit__(self, *_) -> None:
        if self._file and self._in_place():
            with suppress(OSError):
                self.path.unlink()  # while it is locked: whoever has opened it meanwhile sees that it is gone
        self._drop()

    def check(self) -> None:
        """Raises InputError if another process may write to the folder: the locked file is no longer in it, or this
        process is a fork of the one that locked it."""
        if not self._able:
            return
        if self._file is None:
            raise InputError(f"{self.run} is written to by the process that this one was forked from: end this one.")
        if not self.run.is_dir():
            raise gone(self.run)
        if not self._in_place():
            raise InputError(
                f"{self.path} was removed or replaced while the run wrote to {self.run}, so another run may be there: "
                "pass --resume to continue this one, or start a new run."
            )

    def _acquire(self) -> None:
        for _ in range(TRIES):
            self._file = open(self.path, "a+b", buffering=0, opener=_open)  # noqa: SIM115 (closed by _drop)
            _held.add(self)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._in_place():
                    break
            except BlockingIOError:
                check_free(self.run)
            except OSError as error:
                print(f"{self.run} cannot be locked ({error.strerror}): start no other run there.", flush=True)
                self._able = False
                return self._drop()
            self._drop()
            time.sleep(PAUSE)
        else:
            raise InputError(f"{self.path} is locked by others: try again, or choose another --output_dir.")
        since = datetime.now().isoformat(sep=" ", timespec="seconds")
        told = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        self._file.truncate(0)
        self._file.write(json.dumps(told).encode())

    def _in_place(self) -> bool:
        """Whether the file that is open is still the folder's."""
        assert self._file
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # of a network file system that does not answer: no reason to end a run
            return True

    def _drop(self) -> None:
        _held.discard(self)
        if self._file:
            with suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)  # closing is not enough if a fork has the file open too
            self._file.close()
            self._file = None


_held: set[RunLock] = set()


def _leave_to_parent() -> None:
    for lock in _held:
        assert lock._file
        lock._file.close()  # without unlocking, which would unlock it for the parent
        lock._file = None
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_parent)
