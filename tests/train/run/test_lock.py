"""One writer per run folder: the kernel's lock, which the death of its holder frees, and what the second is told."""

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import pytest

from tests.train.run.killing import outcome
from tests.train.run.test_checkpoint import contents
from tests.train.test_trainer import even_is_good, make_trainer
from toolx_kernels.cli import commands
from toolx_kernels.compare.runs import read_run
from toolx_kernels.errors import InputError
from toolx_kernels.models.load import load_model
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.run import lock
from toolx_kernels.train.run.folder import RunFolder
from toolx_kernels.train.run.lock import LOCK, RunLock, check_free
from toolx_kernels.train.run.stopping import Stop, Stopped

SINCE = r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
REMEDY = "wait until that ends or stop it, or choose another --output_dir"


@contextmanager
def child(work):
    """A forked process that runs ``work(say)``, ``say`` waking the parent, and then sleeps; killed at the end."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            work(lambda: os.write(writer, b"."))
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(writer)
    try:
        assert os.read(reader, 1) == b".", "the child failed"
        yield pid
    finally:
        os.close(reader)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_the_second_is_told_who_writes_and_since_when(tmp_path, monkeypatch):
    def hold(say):
        with RunLock(tmp_path):
            say()
            time.sleep(60)

    with child(hold) as pid:
        said = f"is in use, process {pid} {SINCE} writes to it: {REMEDY}"
        for attempt in (lambda: check_free(tmp_path), lambda: RunLock(tmp_path).__enter__()):
            with pytest.raises(InputError, match=said):
                attempt()
        told = json.loads((tmp_path / LOCK).read_text())
        (tmp_path / LOCK).write_text(json.dumps(told | {"host": "gpu7"}))
        with pytest.raises(InputError, match=f"process {pid} on gpu7 {SINCE}"):
            check_free(tmp_path)
        (tmp_path / LOCK).write_text("no JSON")
        monkeypatch.setattr(lock, "PAUSE", 0)
        with pytest.raises(InputError, match="is in use, another process writes to it"):
            check_free(tmp_path)
        (tmp_path / LOCK).write_text(json.dumps(told))
    assert (tmp_path / LOCK).exists()
    check_free(tmp_path)  # the kernel has freed it, whatever the file says
    with RunLock(tmp_path) as held:
        held.check()
        with pytest.raises(InputError, match=f"process {os.getpid()}, this one, {SINCE}"):
            check_free(tmp_path)
        assert json.loads((tmp_path / LOCK).read_text())["host"] == socket.gethostname()
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("how", ["fork", "fork and exec"])
def test_what_a_run_has_started_does_not_keep_the_lock_after_its_death(tmp_path, how):
    def hold(say):
        with RunLock(tmp_path):
            if how == "fork" and not os.fork():
                orphan.write_text(str(os.getpid()))
                time.sleep(60)
            if how != "fork":
                orphan.write_text(str(subprocess.Popen(["sleep", "60"], close_fds=False).pid))
            while not (orphan.exists() and orphan.read_text()):
                time.sleep(0.01)
            say()
            time.sleep(60)

    orphan = tmp_path / "orphan"
    with child(hold), pytest.raises(InputError, match="is in use"):
        check_free(tmp_path)
    with RunLock(tmp_path):
        os.kill(int(orphan.read_text()), signal.SIGKILL)  # it was alive


def test_a_fork_of_a_run_neither_writes_nor_frees(tmp_path):
    run = RunFolder(tmp_path / "run")
    with run.writing(ToolExpanderConfig()):
        run.log("data", 0, {})
        pid = os.fork()
        if not pid:
            code = 1
            try:
                with pytest.raises(InputError, match="by the process that this one was forked from"):
                    run.log("step", 1, {})
                run._lock.__exit__()  # as where an exception leaves train()
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        with pytest.raises(InputError, match="this one"):
            check_free(run.path)
        run.log("step", 2, {})
    assert [line["step"] for line in run.metrics()] == [0, 2]


def test_one_of_many_wins_while_others_look(tmp_path):
    """Each either gets the lock or is refused, and a look takes it from nobody."""
    gate, pids, count = os.pipe(), [], 8
    for number in range(count):
        pid = os.fork()
        if not pid:
            code = 9
            try:
                os.read(gate[0], 1)
                run = RunFolder(tmp_path / "run")
                if number % 2:
                    for _ in range(200):
                        with suppress(InputError):
                            check_free(run.path)
                    code = 3
                else:
                    with run.writing(ToolExpanderConfig()):
                        run.start(ToolExpanderConfig())
                        time.sleep(0.5)
                    code = 0
            except InputError as error:
                code = 2 if re.search("is in use|already holds a run", str(error)) else 8
            finally:
                os._exit(code)
        pids.append(pid)
    os.write(gate[1], b"." * count)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    for end in gate:
        os.close(end)
    assert sorted(codes) == [0, 2, 2, 2, 3, 3, 3, 3]
    with pytest.raises(InputError, match="already holds a run"):
        RunFolder(tmp_path / "run").check(ToolExpanderConfig())


def test_a_folder_that_is_no_longer_the_runs_is_not_written_to(tmp_path):
    run = RunFolder(tmp_path / "run")
    with run.writing(ToolExpanderConfig()):
        run.log("data", 0, {})
        run.path.rename(tmp_path / "moved")
        with pytest.raises(InputError, match="moved is in use, process"):
            check_free(tmp_path / "moved")
        other = RunFolder(run.path)
        with other.writing(ToolExpanderConfig()):
            for write in (lambda: run.log("step", 1, {}), run.check_lock, lambda: run.write_summary({})):
                with pytest.raises(InputError, match="run/run.lock was removed or replaced while the run wrote to"):
                    write()
            other.check_lock()
        with pytest.raises(InputError, match="run was deleted or moved"):
            run.check_lock()
    assert (tmp_path / "moved" / LOCK).exists(), "what is elsewhere now is left alone"
    check_free(tmp_path / "moved")


def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    run = RunFolder(tmp_path)
    with run.writing(ToolExpanderConfig()):
        run.log("data", 0, {})
        run.check_lock()
    assert capsys.readouterr().out == f"{tmp_path} cannot be locked (No locks available): start no other run there.\n"


def test_a_lock_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / LOCK).mkdir()
    with pytest.raises(
        InputError, match=r"run.lock cannot be written \(Is a directory\): mend that, or choose another"
    ):
        RunLock(tmp_path).__enter__()


def test_a_run_that_does_not_begin_leaves_no_folder(tmp_path):
    run = RunFolder(tmp_path / "runs" / "run")
    with pytest.raises(ZeroDivisionError), run.writing(ToolExpanderConfig()):
        assert (run.path / LOCK).exists()
        raise ZeroDivisionError
    assert not run.path.parent.exists()
    run.path.mkdir(parents=True)
    with run.writing(ToolExpanderConfig()):
        pass
    assert [*run.path.iterdir()] == [], "a folder that was there stays"


# ---- whole runs


def test_nobody_touches_a_run_that_is_alive(tmp_path, capsys):
    """What is tried from within a reward function is tried while train() runs."""
    folder, calls = tmp_path / "run", 0

    def busy(prompts, completions, completion_ids, **columns):
        nonlocal calls
        calls += 1
        if calls == 4:
            before = contents(folder)
            said = rf"run is in use, process {os.getpid()}, this one, {SINCE} writes to it"
            for settings in ({}, {"resume": True}, {"overwrite": True}):
                with pytest.raises(InputError, match=said):
                    make_trainer(folder, **settings)
            with pytest.raises(InputError, match=said):
                trainer.train()
            for flag in ("--resume", "--overwrite", "--seed=0"):
                assert commands.main(["train", "--output_dir", str(folder), flag]) == 2
                assert re.search(said, capsys.readouterr().err)
            assert not read_run(folder).finished and load_model(str(folder)), "reading is no writing"
            assert contents(folder) == before
        return even_is_good(prompts, completions, completion_ids)

    trainer = make_trainer(folder, busy, max_steps=1)
    trainer.train()
    assert calls > 4 and not (folder / LOCK).exists()
    before = contents(folder)
    for again in (lambda: make_trainer(folder), trainer.train):
        with pytest.raises(InputError, match="already holds a run: pass --resume to continue it, or --overwrite"):
            again()
    trainer.args.overwrite = True
    with pytest.raises(InputError, match="This trainer has changed its model: make another one"):
        trainer.train()
    assert contents(folder) == before


def test_a_trainer_that_was_stopped_goes_on_where_it_was_told_to_resume(finished, tmp_path):
    def stopping():
        if trainer.rounds.step == 2:
            stop.handle(signal.SIGTERM, None)
        return step()

    stop, trainer = Stop(), make_trainer(tmp_path / "run")
    step, trainer.step = trainer.step, stopping
    with pytest.raises(Stopped):
        trainer.train(stop)
    assert not (tmp_path / "run" / "summary.json").exists() and not (tmp_path / "run" / LOCK).exists()
    trainer.args.resume, trainer.step = True, step
    trainer.train(Stop())
    assert outcome(tmp_path / "run") == outcome(finished[0])


@pytest.mark.soak
def test_two_commands_at_the_same_moment(tmp_path):
    run = tmp_path / "run"
    flags = "--train_rows 8 --eval_rows 4 --prompts_per_step 4 --num_generations 2 --max_steps 1 --probe_rollouts 1"
    flags += " --max_completion_length 4 --cold_start_steps 1 --cold_start_batch_size 2 --output_dir"
    command = [sys.executable, "-m", "toolx_kernels.cli", "train", *flags.split(), str(run)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = {one.communicate()[1]: one.returncode for one in both}
    assert sorted(said.values()) == [0, 2]
    (refusal,) = (text for text, code in said.items() if code)
    assert re.search(r"run (is in use, process|already holds a run)", refusal)
    assert [line["step"] for line in RunFolder(run).metrics() if line["event"] == "step"] == [1]
