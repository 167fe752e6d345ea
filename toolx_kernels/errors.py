"""The one exception that means "the user can fix this"."""


class InputError(ValueError):
    """Bad input from outside: a flag, a file, a dataset row, a model name, a reward function.

    The message is one sentence that names the offending value and the remedy. The command line prints
    it and exits with code 2; library callers may catch it as a ``ValueError``.
    """
