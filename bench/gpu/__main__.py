"""Main program of ``make gpu``: all measurements that need a CUDA GPU, most useful first, from the source tree.

Needs torch with CUDA, triton, transformers and pytest; installs nothing. Writes ``facts.jsonl`` (a line for each fact,
as soon as it is known), ``summary.md`` and the output of its commands into ``bench/results/<gpu>/``, or into the folder
that the environment variable OUT names. The exit status is 1 if a fact failed or had no time.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import os
import shutil
import signal
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.common.machine import slug_of
from bench.gpu.runner import ROOT, Bench, Journal, commit, find_all, read_journal, restart_with
from bench.gpu.summary import summary

NEEDED = ("torch", "triton", "transformers", "pytest")


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if not 0 < args.minutes <= 10_000:
        return refuse(f"--minutes {args.minutes:g} must be more than 0, and at most 10,000.")
    if absent := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        return refuse(f"{sys.executable} has no {absent[0]}: install it, or use another Python: make gpu PYTHON=...")
    if args.known and not args.known.exists():
        return refuse(f"--known {args.known} does not exist: name the facts.jsonl of an earlier run.")
    deadline = time.monotonic() + 60 * args.minutes
    # A background job of a shell ignores interrupts; here either signal ends the run, which keeps its facts.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    import torch

    if not (args.toy or torch.cuda.is_available()):
        build = "sees no GPU" if torch.version.cuda else "is not a CUDA build"
        return refuse(f"torch {torch.__version__} {build}: run this where torch.cuda.is_available(), or with --toy.")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    folder = folder_of(torch.cuda.get_device_name() if device.type == "cuda" else "toy")
    known = read_journal(args.known) if args.known else {}
    journal = Journal(folder / "facts.jsonl", kept(known, args.restarted), without_paths(), commit())
    print(f"{folder.name}: facts go to facts.jsonl", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        bench = Bench(device, args.toy, Path(scratch), Path(scratch) / "logs", path)
        bench.logs.mkdir()

        def restart() -> None:
            shutil.rmtree(scratch, ignore_errors=True)
            left = max(deadline - time.monotonic(), 0.1) / 60
            again = ["--minutes", f"{left:.2f}", "--known", str(journal.path), "--restarted"]
            restart_with([*again, *["--toy"] * args.toy, *(["--only", *args.only] if args.only else [])])

        def find(facts: Callable) -> bool:
            chosen = [f for f in facts(bench) if not args.only or any(fnmatch.fnmatch(f.name, p) for p in args.only)]
            find_all(chosen, journal, bench, deadline, restart)
            return bool(chosen)

        try:
            from bench.gpu import machine

            found = find(machine.facts)
            from bench.gpu import facts  # imports the package, which the build may just have completed

            if not (find(facts.facts) or found):
                return refuse(f"--only {' '.join(args.only)} names no fact: they are in bench/gpu/facts.py.")
        except KeyboardInterrupt:
            print("make gpu: interrupted; what was found is kept.", file=sys.stderr)
            return 1
        finally:
            (folder / "summary.md").write_text(summary(journal.facts), encoding="utf-8")
            with tarfile.open(folder / "logs.tar.gz", "w:gz") as archive:
                archive.add(bench.logs, "logs")
    print("\n" + (folder / "summary.md").read_text(encoding="utf-8"))
    return 0 if all(line["status"] in ("ok", "skipped") for line in journal.facts.values()) else 1


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="make gpu", description="All measurements that need a CUDA GPU.")
    found.add_argument(
        "--minutes", type=float, default=10, help="time limit of the whole run (default: 10); a slow card needs more"
    )
    found.add_argument("--only", nargs="+", metavar="PATTERN", help="only facts of these names, such as 'loss/*'")
    found.add_argument("--known", type=Path, metavar="FACTS", help="a facts.jsonl: its ok facts are not measured again")
    found.add_argument("--toy", action="store_true", help="everything at toy size, also without a GPU")
    found.add_argument("--restarted", action="store_true", help=argparse.SUPPRESS)  # after a broken CUDA context
    return found


def refuse(reason: str) -> int:
    print(f"make gpu: {reason}", file=sys.stderr)
    return 1


def folder_of(gpu: str) -> Path:
    if os.environ.get("OUT"):
        folder = Path(os.environ["OUT"])
    else:
        folder = ROOT / "bench" / "results" / slug_of(gpu)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def kept(known: dict[str, dict], restarted: bool) -> dict[str, dict]:
    """The known facts that are not measured again: ok and skipped ones, except those that describe this run; after a
    restart those too, and failed ones."""
    wanted = ("ok", "skipped", "failed") if restarted else ("ok", "skipped")
    own = () if restarted else ("machine", "build", "compiled part")
    return {name: line for name, line in known.items() if line["status"] in wanted and name not in own}


def without_paths() -> Callable[[str], str]:
    """Returns a function that removes this machine's folders from a text, because results are committed."""
    packages, home = sysconfig.get_path("purelib"), str(Path.home())
    named = {tempfile.gettempdir(): "<scratch>", str(ROOT): ".", packages: "<packages>", sys.prefix: "<python>"}
    named[home] = "~"
    named = {folder: name for folder, name in named.items() if folder not in ("/", "/usr", "/usr/local")}

    def clean(text: str) -> str:
        for folder in sorted(named, key=len, reverse=True):
            text = text.replace(folder, named[folder])
        return text

    return clean


if __name__ == "__main__":
    sys.exit(main())
