"""Killed and stopped runs, which end like an undisturbed run once resumed."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.train.run.killing import SETTINGS, outcome
from tests.train.test_trainer import SMALL, even_is_good
from toolx_kernels.cli import commands
from toolx_kernels.models.load import latest_checkpoint
from toolx_kernels.train import task
from toolx_kernels.train.collect import Collector
from toolx_kernels.train.run import checkpoint
from toolx_kernels.train.run.stopping import Stop, Stopped, stop_on_signals
from toolx_kernels.train.trainer import ToolExpanderTrainer

FLAGS = (
    SMALL | SETTINGS | {"hard_sampling": "replace", "train_rows": 8, "eval_rows": 4, "eval_steps": 2, "save_steps": 3}
)


@pytest.mark.soak
def test_killed_runs_end_as_undisturbed_ones():
    """Four kills, one per entry of ``KINDS``; ``make soak`` does two hundred."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.run.killing", "--kills", "4"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert len(re.findall(r"^kill \d of 4: ", done.stdout, re.M)) == 4
    assert "all as the undisturbed one" in done.stdout


def run(folder, *flags):
    """Runs ``toolx train`` on a few rows, with a reward that a random model earns."""
    settings = [text for name, value in FLAGS.items() for text in (f"--{name}", str(value))]
    return commands.main(["train", "--output_dir", str(folder), *settings, *flags])


@pytest.fixture(autouse=True)
def _easy_reward(monkeypatch):
    monkeypatch.setattr(task, "CallReward", lambda *_, **__: even_is_good)


@pytest.fixture(autouse=True)
def _python_handles_ctrl_c():
    """Installs Python's handler, because a process started in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(task, "CallReward", lambda *_, **__: even_is_good)
        assert run(folder) == 0
    return outcome(folder)


def tell(*signals, owner, name, calls):
    """``setattr`` arguments that make call number ``calls`` of ``owner.name`` first send this process the signals."""
    inner, count = getattr(owner, name), 0

    def told(*arguments, **keywords):
        nonlocal count
        count += 1
        if count == calls:
            for number in signals:
                signal.raise_signal(number)
        return inner(*arguments, **keywords)

    return owner, name, told


TERM, INT = signal.SIGTERM, signal.SIGINT
# signals, owner and name of the call that they precede, its number, exit code, step of the last checkpoint
STOPS = {
    "a step": ((TERM,), ToolExpanderTrainer, "step", 1, 143, 1),
    "a step that ends a round and whose evaluation is due": ((INT,), ToolExpanderTrainer, "step", 2, 130, 2),
    "the last step": ((TERM, TERM), ToolExpanderTrainer, "step", 4, 143, 4),
    "a save": ((TERM,), checkpoint, "_write", 2, 143, 2),
    "the step behind an evaluation and a probe, twice": ((INT, INT), ToolExpanderTrainer, "step", 3, 130, 2),
    "the first probe": ((TERM,), Collector, "_solved", 1, 143, 0),
    "a wave of the second probe": ((INT,), Collector, "_solved", 4, 130, 0),
    "an evaluation between": ((TERM,), ToolExpanderTrainer, "evaluate", 2, 143, 0),
    "the last evaluation": ((INT,), ToolExpanderTrainer, "evaluate", 3, 130, 4),
    "the first evaluation": ((TERM,), ToolExpanderTrainer, "evaluate", 1, 143, 0),
    "the cold start": ((TERM,), ToolExpanderTrainer, "_save", 1, 143, None),
}


@pytest.mark.parametrize("during", STOPS)
def test_a_run_that_is_told_to_stop(tmp_path, monkeypatch, capsys, undisturbed, during):
    signals, owner, name, calls, code, step = STOPS[during]
    before = [signal.getsignal(number) for number in (TERM, INT)]
    with monkeypatch.context() as patched:
        patched.setattr(*tell(*signals, owner=owner, name=name, calls=calls))
        assert run(tmp_path / "run") == code
    assert [signal.getsignal(number) for number in (TERM, INT)] == before
    said = capsys.readouterr().err.splitlines()[-1]
    last = latest_checkpoint(tmp_path / "run")
    assert last == (None if step is None else tmp_path / "run" / f"checkpoint-{step}")
    if len(signals) == 2 and signals[1] == INT:
        how = "interrupted"
    else:
        how = f"stopped by {signals[0].name}"
    way_on = f"--resume continues from {last}" if last else "nothing was saved yet, so --overwrite starts it again"
    assert said.removeprefix("toolx train: ") == f"{how}: {way_on}."
    assert not (tmp_path / "run" / "summary.json").exists()
    assert run(tmp_path / "run", "--resume", "true") == 0
    resumed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("resuming "))
    if last:
        assert re.fullmatch(
            rf"resuming from checkpoint-{step}(, repeating( and|( \d+ (step|probe|evaluation)s?))+)?", resumed
        )
    else:
        assert resumed == "resuming from the start, as nothing was saved yet, repeating 1 cold-start step"
    assert outcome(tmp_path / "run") == undisturbed


def test_handlers_are_only_those_of_the_main_thread_and_ignored_signals_stay_ignored():
    def install():
        with stop_on_signals() as stop:
            seen.append((signal.getsignal(TERM), signal.getsignal(INT), stop.handle))

    seen = []
    thread = threading.Thread(target=install)
    thread.start()
    thread.join()
    assert seen[0][:2] == (signal.getsignal(TERM), signal.getsignal(INT))
    ignored = signal.signal(INT, signal.SIG_IGN)
    try:
        install()
    finally:
        signal.signal(INT, ignored)
    assert seen[1] == (seen[1][2], signal.SIG_IGN, seen[1][2])


def test_a_stop_waits_for_the_outermost_block_and_for_none_that_failed():
    stop = Stop()
    with pytest.raises(ZeroDivisionError), stop.deferred():
        stop.handle(TERM, None)
        raise ZeroDivisionError
    done = []
    with pytest.raises(Stopped) as stopped, stop.deferred():
        with stop.deferred():
            done.append("inner")
        done.append("outer")
    assert done == ["inner", "outer"] and stopped.value.signal is TERM
    with pytest.raises(KeyboardInterrupt), stop.deferred():
        stop.handle(INT, None)  # Ctrl-C after another signal
        done.append("never")
    assert done == ["inner", "outer"]
