"""The one exception that means "the user can fix this", and how to tell the errors of others."""

from safetensors import SafetensorError

# what transformers, safetensors and torch raise over files that are damaged or of another model
LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)
MEMORY_ERRORS = (RuntimeError, MemoryError)  # to be caught where ``out_of_memory`` is asked
_WORDS = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # of torch and Triton, of a CPU, of cuBLAS


class InputError(ValueError):
    """Bad input from outside: a flag, a file, a dataset row, a model name, a reward function.

    The message is one sentence that names the offending value and the remedy. The command line prints
    it and exits with code 2; library callers may catch it as a ``ValueError``.
    """


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory could not be had: few of those that do have a type of their own."""
    if (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    ):  # torch's, which is not loaded here
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def first_line(error: BaseException) -> str:
    """What an error says, short enough to be quoted in a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
