"""Argument parsers whose errors are one sentence."""

from __future__ import annotations

import argparse

from toolx_kernels.errors import InputError  # noqa: E402


class _OneSentence:
    """A parser whose errors are one sentence instead of a page of usage."""

    def error(self, message):
        raise InputError(f"{message}; see {self.prog} --help.")


class _Parser(_OneSentence, argparse.ArgumentParser):
    pass
