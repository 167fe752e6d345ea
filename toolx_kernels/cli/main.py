"""``toolx train | eval | compare | plan | doctor``. Bad input ends in one sentence on stderr and exit code 2."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from toolx_kernels.cli.compare import compare
from toolx_kernels.cli.doctor import doctor
from toolx_kernels.cli.evaluate import evaluate
from toolx_kernels.cli.plan import plan
from toolx_kernels.cli.train import train

# Two OpenMP pools that spin while waiting slow each other down many times; this must be set before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# transformers loads torchao, where it is installed, and that complains of parts for other machines and of torch.
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)

from toolx_kernels.errors import MEMORY_ERRORS, InputError, first_line, out_of_memory  # noqa: E402

USAGE = """usage: toolx <command> [flags]

  train    train a model to call tools; without flags: the built-in task, in minutes on a laptop
  eval     score a model or checkpoint on datasets
  compare  put learning curves and final figures of several runs side by side
  plan     the memory that a run would take, before anything is loaded, and what to change if it does not fit
  doctor   what is installed here, and which backend each op uses

toolx <command> --help lists the flags.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = {"train": train, "eval": evaluate, "compare": compare, "plan": plan, "doctor": doctor}
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] not in commands:
        print(f"toolx: {argv[0]!r} is no command: use one of {', '.join(commands)}.", file=sys.stderr)
        return 2
    try:
        return commands[argv[0]](argv[1:])
    except InputError as error:
        print(f"toolx {argv[0]}: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a folder that cannot be written, a full disk
        print(f"toolx {argv[0]}: {error.filename or 'file'}: {error.strerror or error}.", file=sys.stderr)
        return 2
    except MEMORY_ERRORS as error:
        if not out_of_memory(error):
            raise
        print(
            f"toolx {argv[0]}: memory ran out ({first_line(error)}): toolx plan tells what a run needs and what to "
            "change; a run goes on from its last checkpoint with --resume.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        remedy = "; the same command with --resume goes on from the last checkpoint" if argv[0] == "train" else ""
        print(f"toolx {argv[0]}: interrupted{remedy}.", file=sys.stderr)
        return 130
