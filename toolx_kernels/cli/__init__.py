"""The command line: ``toolx``, also as ``python -m toolx_kernels.cli``."""
