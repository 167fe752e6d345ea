"""InputError ("the user can fix this"), and helpers that classify and survive other libraries' errors."""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import TypeVar

from safetensors import SafetensorError

T = TypeVar("T")

# raised by transformers, safetensors and torch for damaged files, files of another model and missing packages
LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError)
MEMORY_ERRORS = (RuntimeError, MemoryError)  # catch these, then test with ``out_of_memory``
_WORDS = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # from torch and Triton, from a CPU, from cuBLAS


class InputError(ValueError):
    """Bad input from outside: a flag, a file, a dataset row, a model name, a reward function.

    The message is one sentence that names the offending value and the remedy. The command line prints
    it and exits with code 2; library callers may catch it as a ``ValueError``.
    """


class DivergedError(InputError):
    """A log-prob, the loss or the gradient is not finite; the weights have not been updated with it."""


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` means out of memory; few such errors have a type of their own."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, by name: no import
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def retry_with_less(work: Callable[[], T], give_back: Callable[[str], bool]) -> T:
    """Returns ``work()``, and repeats it after an out-of-memory error as long as ``give_back(reason)`` frees something.

    If it returns False, the error is raised. The tensors of the failed attempt are freed before it is called.
    """
    while True:
        try:
            return work()
        except MEMORY_ERRORS as error:
            if not out_of_memory(error):
                raise
            # frames in its traceback, and in those of its causes, keep these tensors alive
            failure = error.with_traceback(None)
            failure.__cause__ = failure.__context__ = None
        if not give_back(first_line(failure)):
            raise failure
        del failure


def first_line(error: BaseException) -> str:
    """The first line of an error's message, of at most 300 characters; its class name if there is none."""
    try:
        line = "".join(str(error).strip().splitlines()[:1])
    except (Exception, SystemExit):  # raised by a user's __str__
        line = ""
    return _cut(line or type(error).__name__, 300)


def name_of(function: object) -> str:
    """``function.__name__`` of at most 80 characters; the name of its type if it has none."""
    try:
        name = function.__name__  # type: ignore[attr-defined]
    except (Exception, SystemExit):  # raised by a user's property
        name = ""
    return _cut(name, 80) if isinstance(name, str) and name else type(function).__name__


def short(value: object) -> str:
    """``repr(value)`` as one line of at most 80 characters."""
    try:
        text = " ".join(repr(value).split("\n"))
    except RecursionError:
        return "a value nested hundreds deep"
    except (Exception, SystemExit) as error:  # Python writes no whole number of more than 4300 digits
        long = isinstance(error, ValueError) and type(value).__module__ == "builtins"
        return "a number of thousands of digits" if long else f"an object of {type(value).__name__}"
    return _cut(text, 80)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def counted(count: int, noun: str) -> str:
    """A number and its noun, in the plural where it needs one.

    >>> counted(1, "step"), counted(1200, "step")
    ('1 step', '1,200 steps')
    """
    return f"{count:,} {noun}{'s' * (count != 1)}"


def did_you_mean(word: object, known: Iterable[str], otherwise: str) -> str:
    """The end of a sentence about an unknown ``word``: the ``known`` one that begins with it or is spelled most like
    it, or ``otherwise``.

    >>> did_you_mean("trian", ["train", "eval"], "use train or eval.")
    'did you mean train?'
    """
    names = list(known)
    begun = [name for name in names if len(str(word)) > 2 and name.startswith(str(word))]
    close = begun or get_close_matches(str(word), names, n=1)
    return f"did you mean {close[0]}?" if close else otherwise
