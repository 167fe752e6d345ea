"""Runs of the learning records: starting, taking turns and continuing."""

import stat
import subprocess
import sys

import pytest

from bench.learning import run

# Saves a checkpoint per step and ends after the fifth; on a stop signal it saves the current step and exits.
TRAINER = """#!{python}
import signal, sys, time
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--output_dir") + 1])
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
folder.mkdir(exist_ok=True)
(folder / "config.yaml").touch()
done = len(list(folder.glob("checkpoint-*")))
print("began at", done, "resume" if "--resume" in sys.argv else "new", flush=True)
if "--fails" in sys.argv:
    sys.exit({code})
for step in range(done + 1, 6):
    (folder / f"checkpoint-{{step}}").mkdir()
    time.sleep(0.1)
    if told:
        sys.exit(143)
(folder / "summary.json").touch()
"""


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """Stand-in for ``python -m toolx_kernels.cli train``."""

    def write(code=0):
        script = tmp_path / "trainer"
        script.write_text(TRAINER.format(python=sys.executable, code=code))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(run.sys, "executable", str(script))
        monkeypatch.setattr(run, "POLL_SECONDS", 0.01)
        return tmp_path / "arm"

    return write


def test_a_run_has_its_turn_and_goes_on_at_the_next(trainer):
    folder = trainer()
    assert run.train(folder, {}, [], 1, turn=2) is False
    first = run.saved_steps(folder)
    assert 2 <= first < 5 and not (folder / "summary.json").exists()
    assert run.train(folder, {}, [], 1) is True and (folder / "summary.json").exists()
    assert folder.with_suffix(".log").read_text() == f"began at 0 new\nbegan at {first} resume\n"
    assert run.train(folder, {}, [], 1) is True
    assert folder.with_suffix(".log").read_text().count("began") == 2, "a finished run is left alone"


@pytest.mark.parametrize("code", [1, 143])
def test_a_run_that_fails_or_is_stopped_by_others_ends_the_record(trainer, code):
    folder = trainer(code)
    with pytest.raises(subprocess.CalledProcessError):
        run.train(folder, {}, ["--fails"], 1, turn=2)


@pytest.mark.parametrize("argv", [["coder", "runs"], ["smollm2", "runs", "--model", "coder.gguf"]])
def test_a_model_is_for_records_without_a_cold_start(argv, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run", *argv])
    with pytest.raises(SystemExit) as end:
        run.main()
    assert end.value.code == 2 and "--model" in capsys.readouterr().err


def test_arms_take_turns_until_all_are_finished(monkeypatch, tmp_path):
    asked = []

    def train(folder, settings, configs, threads, turn):
        asked.append((folder.name, settings["model"], turn, settings["eval_rows"]))
        return len(asked) > 2  # the first turn of each ends unfinished

    monkeypatch.setattr(run, "train", train)
    monkeypatch.setattr(
        sys, "argv", ["run", "coder", str(tmp_path), "--model", "m.gguf", "--workers", "1", "--turn", "2"]
    )
    run.main()
    assert asked == [(f"{name}-seed0", "m.gguf", 2, 1) for name in ("grpo", "retry", "grpo", "retry")]


@pytest.mark.parametrize("flag", ["--workers 0", "--workers 1000000000", "--turn 0", "--seeds -1", "--seeds 1e9"])
def test_numbers_out_of_bounds_are_refused(flag, capsys, tmp_path, monkeypatch):
    name, value = flag.split()
    monkeypatch.setattr(sys, "argv", ["run", "smollm2", str(tmp_path), f"{name}={value}"])
    with pytest.raises(SystemExit):
        run.main()
    assert f"argument {name}: '{value}' must be a number from" in capsys.readouterr().err
