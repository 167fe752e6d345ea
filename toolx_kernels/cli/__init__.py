"""The command line: ``toolx``, also as ``python -m toolx_kernels.cli``."""

from toolx_kernels.cli.commands import main as main
