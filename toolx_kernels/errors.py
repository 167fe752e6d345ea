"""InputError ("the user can fix this"), and helpers that classify and survive other libraries' errors."""

from collections.abc import Callable
from typing import TypeVar

from safetensors import SafetensorError

T = TypeVar("T")

# what transformers, safetensors and torch raise over files that are damaged, of another model or of a missing package
LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError)
MEMORY_ERRORS = (RuntimeError, MemoryError)  # to be caught where ``out_of_memory`` is asked
_WORDS = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # of torch and Triton, of a CPU, of cuBLAS


class InputError(ValueError):
    """Bad input from outside: a flag, a file, a dataset row, a model name, a reward function.

    The message is one sentence that names the offending value and the remedy. The command line prints
    it and exits with code 2; library callers may catch it as a ``ValueError``.
    """


class DivergedError(InputError):
    """A log-prob, the loss or the gradient is no longer a number; the weights have not been touched by it."""


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` means out of memory; few such errors have a type of their own."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's: it is not loaded here
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def retry_with_less(work: Callable[[], T], give_back: Callable[[str], bool]) -> T:
    """What ``work()`` returns. Whenever it runs out of memory it is done again if ``give_back(reason)`` could give some
    back; otherwise that error is raised. The tensors of the failed attempt are free when ``give_back`` is called."""
    while True:
        try:
            return work()
        except MEMORY_ERRORS as error:
            if not out_of_memory(error):
                raise
            # the frames of its traceback hold these tensors, and so do those of its causes
            failure = error.with_traceback(None)
            failure.__cause__ = failure.__context__ = None
        if not give_back(first_line(failure)):
            raise failure
        del failure


def first_line(error: BaseException) -> str:
    """What an error says, short enough to be quoted in a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
