"""What goes wrong when files of weights are read, and how to say it."""

from __future__ import annotations

from safetensors import SafetensorError

# what transformers, safetensors and torch raise over files that are damaged or of another model
LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)


def first_line(error: Exception) -> str:
    """What an error says, short enough to be quoted in a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
