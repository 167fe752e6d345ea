"""``make gpu``: all that only a CUDA GPU can tell, in ten minutes, from the source tree.

Needs torch with CUDA, triton, transformers and pytest; installs nothing. Builds the extension for the GPU, runs the
tests, trains end to end, looks for memory errors, measures; goes on after a failure. Writes ``summary.md``,
``summary.json`` and the steps' output into ``bench/results/<gpu>/`` and prints the summary, failures last.
The exit status is 1 when a step failed or there was no time for it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from datetime import date
from importlib import metadata
from pathlib import Path

from bench.gpu.run import ROOT, Result, last_line, run_all, summary
from bench.gpu.steps import steps

NEEDED = ("torch", "triton", "transformers", "pytest")
# A 24 GB card has 24 GiB; the 1.8 GB between the two are for the CUDA context and the desktop.
MEMORY_CAP_BYTES = 24e9


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description="All that only a CUDA GPU can tell.")
    parser.add_argument("--minutes", type=float, default=10, help="of the whole run (10); a slow card needs more")
    minutes = parser.parse_args(argv).minutes
    if not minutes > 0:
        return refuse(f"--minutes {minutes:g} must be more than 0.")
    if absent := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        return refuse(f"{sys.executable} has no {absent[0]}: install it, or name another: make gpu PYTHON=...")
    facts = ask()
    if "problem" in facts:
        return refuse(f"{facts['problem']}: run this where torch.cuda.is_available().")

    capped = memory_cap(facts["memory_bytes"])
    facts["memory_allowed_bytes"] = ask(capped).get("memory_allowed_bytes", facts["memory_bytes"])
    folder = ROOT / "bench" / "results" / facts["machine"]
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    for old in (folder / "logs").glob("*.log"):
        old.unlink()
    print(f"{facts['gpu']}: results go to {folder.relative_to(ROOT)}", flush=True)

    # A shell that starts this in the background lets it ignore interrupts, and so would every step.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as scratch:

        def keep(results: list[Result]) -> None:
            record = facts | {"steps": {r.step: describe(r) for r in results}}
            (folder / "summary.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            (folder / "summary.md").write_text(summary(facts["gpu"], lines(facts), results), encoding="utf-8")

        # A twentieth is for starting up and for steps that must be interrupted.
        results = run_all(
            steps(facts, capped, Path(scratch)), 0.95 * 60 * minutes, folder / "logs", without_paths(scratch), keep
        )
    print("\n" + (folder / "summary.md").read_text(encoding="utf-8"))
    return 0 if all(result.passed for result in results) else 1


def refuse(reason: str) -> int:
    print(f"make gpu: {reason}", file=sys.stderr)
    return 1


def ask(env: dict[str, str] | None = None) -> dict:
    """``find_facts`` in a process of its own: a CUDA context in this one would take memory from every step."""
    command = [sys.executable, "-c", "import json; from bench.gpu.__main__ import *; print(json.dumps(find_facts()))"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | (env or {}), capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"problem": last_line(done.stderr)}


def find_facts() -> dict:
    """The machine, or why it is of no use, under ``problem``."""
    import torch

    if not torch.version.cuda:
        return {"problem": f"torch {torch.__version__} is not a CUDA build"}
    if not torch.cuda.is_available():
        return {"problem": f"torch {torch.__version__} sees no GPU"}
    device = torch.cuda.get_device_properties(0)
    return {
        "gpu": device.name,
        "machine": re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-"),
        "capability": f"{device.major}.{device.minor}",
        "memory_bytes": device.total_memory,
        "memory_allowed_bytes": round(torch.cuda.get_per_process_memory_fraction(0) * device.total_memory),
        "driver": printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": nvcc_version(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in NEEDED},
        "commit": printed("git", "describe", "--always", "--dirty"),
        "date": date.today().isoformat(),
    }


def printed(*command: str) -> str | None:
    """The first line that a command prints, or None."""
    if shutil.which(command[0]) is None:
        return None
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.partition("\n")[0] or None


def nvcc_version() -> str | None:
    """Of the nvcc that setup.py will use."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if found is None:
        return None
    output = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    return next(iter(re.findall(r"release ([\d.]+)", output)), None)


def memory_cap(total_bytes: int) -> dict[str, str]:
    """The environment under which torch takes no more than 24 GB; empty on a card that has no more."""
    if total_bytes <= MEMORY_CAP_BYTES:
        return {}
    variable = "PYTORCH_ALLOC_CONF" if "PYTORCH_ALLOC_CONF" in os.environ else "PYTORCH_CUDA_ALLOC_CONF"
    settings = [os.environ[variable]] if os.environ.get(variable) else []
    return {variable: ",".join([*settings, f"per_process_memory_fraction:{MEMORY_CAP_BYTES / total_bytes:.6f}"])}


def without_paths(scratch: str):
    """A function that takes this machine's folders out of a text: results are made to be committed."""
    packages, home = sysconfig.get_path("purelib"), str(Path.home())
    named = {scratch: "<scratch>", str(ROOT): ".", packages: "<packages>", sys.prefix: "<python>", home: "~"}
    named = {folder: name for folder, name in named.items() if folder not in ("/", "/usr", "/usr/local")}

    def clean(text: str) -> str:
        for folder, name in named.items():
            text = text.replace(folder, name)
        return text

    return clean


def describe(result: Result) -> dict:
    names = ("status", "seconds", "words", "figures", "failures", "notes")
    return {name: getattr(result, name) for name in names if getattr(result, name)}


def lines(facts: dict) -> list[str]:
    """The head of the summary: what was measured on what."""
    allowed = facts["memory_allowed_bytes"]
    memory = f"Training and the benchmarks may take {allowed / 1e9:.1f} GB of GPU memory."
    if allowed > 1.01 * min(MEMORY_CAP_BYTES, facts["memory_bytes"]):
        memory = "torch did not take the cap of 24 GB: nothing here is known to fit such a card."
    return [
        f"{facts['memory_bytes'] / 2**30:.1f} GiB, sm_{facts['capability'].replace('.', '')}, driver "
        f"{facts['driver'] or 'unknown'}, nvcc {facts['nvcc'] or 'absent'}; torch {facts['torch']}, triton "
        f"{facts['triton']}, transformers {facts['transformers']}, Python {facts['python']}; commit "
        f"{facts['commit'] or 'unknown'}, {facts['date']}.",
        memory,
    ]


if __name__ == "__main__":
    sys.exit(main())
