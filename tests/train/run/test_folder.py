"""The run folder: what is a run of ours, and what else has its names."""

import os
import shutil
import zlib

import pytest
import yaml

from tests.train.run.test_checkpoint import contents
from tests.train.test_trainer import make_trainer
from toolx_kernels.cli import commands
from toolx_kernels.compare.runs import read_run
from toolx_kernels.errors import InputError
from toolx_kernels.models.load import checkpoints
from toolx_kernels.train import rows
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.run import checkpoint, metrics
from toolx_kernels.train.run.curves import write_curves
from toolx_kernels.train.run.folder import RunFolder
from toolx_kernels.train.run.lock import RunLock

DATA = '{"event": "data", "step": 0, "timing": {}}\n'


@pytest.fixture
def run(tmp_path):
    """A run with two checkpoints, whose files are empty."""
    folder = RunFolder(tmp_path / "run")
    folder.start(ToolExpanderConfig())
    folder.log("data", 0, {})
    for step in (0, 2):
        (folder.path / f"checkpoint-{step}").mkdir()
        (folder.path / f"checkpoint-{step}" / "weights").touch()
    return folder


def settings(run, **changed):
    return ToolExpanderConfig(output_dir=str(run.path), **changed)


MODES = pytest.mark.parametrize("mode", [{}, {"resume": True}, {"overwrite": True}], ids=str)


@MODES
@pytest.mark.parametrize(
    "files",
    [
        {"config.yaml": "lr: 0.1"},
        {"config.yaml": "{output_dir: out, seed: 1, learning_rate: 0.1, num_generations: 8, max_steps: 9, beta: 0.1}"},
        {"config.yaml": "", "rows.jsonl": "{}"},
        {"config.yaml": "{", "metrics.jsonl": '{"step": 1, "loss": 0.5}\n'},
        {"config.yaml": "a: 1", "metrics.jsonl": "[" * 200_000},
        {"config.yaml": "prompts_per_step: 2\nprobe_rollouts: 4", "mine.py": ""},
        {"metrics.jsonl": DATA},
    ],
    ids=["hydra", "trl", "empty", "open", "deep", "recipe", "log"],
)
def test_a_strangers_folder_is_left_alone(tmp_path, capsys, files, mode):
    """Hydra and transformers write a config.yaml and checkpoint-<step> folders, too."""
    (tmp_path / "checkpoint-100").mkdir()
    for name, text in ({"checkpoint-100/w": ""} | files).items():
        (tmp_path / name).write_text(text)
    before = contents(tmp_path)
    said = f"output_dir={tmp_path} holds other files but no run: choose an empty or new folder"
    with pytest.raises(InputError, match=said):
        RunFolder(tmp_path).check(ToolExpanderConfig(output_dir=str(tmp_path), **mode))
    assert not RunFolder(tmp_path).holds_run()
    if mode:
        flags = [f"--{name}" for name in mode]
        assert commands.main(["train", "--model", "tiny", *flags, "--output_dir", str(tmp_path)]) == 2
        assert said in capsys.readouterr().err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ["", "{", "seed: 0\nmodel: ti", "[" * 1000], ids=["none", "open", "cut", "deep"])
def test_a_run_with_damaged_settings_is_a_run_still(run, text):
    (run.path / "config.yaml").write_text(text)
    with pytest.raises(InputError, match="already holds a run"):
        run.check(settings(run))
    if "seed" not in text:
        with pytest.raises(InputError, match=r"config.yaml is damaged: start another run folder, or pass --overwrite"):
            run.check(settings(run, resume=True))
    run.check(settings(run, overwrite=True))
    run.start(settings(run, overwrite=True))
    assert [path.name for path in run.path.iterdir()] == ["config.yaml"] and run.holds_run()


@MODES
@pytest.mark.parametrize("kind", ["folder", "pipe", "broken link"])
@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "rollouts.jsonl", "hard_samples.jsonl", "summary.json", "curves.png", "trace.json", "run.lock"]
    + ["config.yaml", "config.yaml.part", "checkpoint-7"],
)
def test_what_only_has_the_name_of_a_file_of_a_run(run, name, kind, mode):
    """Found before anything is deleted or done, and without waiting for a pipe."""
    path = run.path / name
    path.unlink(missing_ok=True)
    if name == "checkpoint-7" and kind == "folder":
        path.touch()
    else:
        {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "broken link": lambda: path.symlink_to("no")}[kind]()
    said = "holds other files but no run" if name == "config.yaml" else f"{name} is no (plain file|folder that can be)"
    with (
        pytest.raises(InputError, match=said),
        run.writing(settings(run, **mode)),
    ):
        raise AssertionError
    assert len(checkpoints(run.path)) == 2


def test_a_lock_that_is_a_link_does_not_empty_its_target(run):
    (run.path.parent / "mine").write_text("text")
    (run.path / "run.lock").symlink_to("../mine")
    with pytest.raises(InputError, match="run.lock is no plain file"), run.writing(settings(run, overwrite=True)):
        raise AssertionError
    with pytest.raises(InputError, match="run.lock cannot be written"):
        RunLock(run.path).__enter__()
    assert (run.path.parent / "mine").read_text() == "text"


def test_of_a_checkpoint_on_another_disk_the_link_is_removed(run):
    other = run.path.parent / "disk"
    other.mkdir()
    for name in ("checkpoint-2", ".checkpoint-1.old"):
        (other / name).mkdir()
        shutil.rmtree(run.path / name, ignore_errors=True)
        (run.path / name).symlink_to(other / name)
    checkpoint.remove(run.path / "checkpoint-2")
    checkpoint.sweep(run.path)
    assert [path.name for path in run.path.glob("*checkpoint-*")] == ["checkpoint-0"]
    assert len([*other.iterdir()]) == 2


def test_a_run_is_not_put_into_another(run, tmp_path):
    for inner in ("new", "checkpoint-2", "checkpoint-2/x"):
        inner_path = run.path / inner
        said = f"{inner} is inside {run.path}, which holds a run: choose a folder outside it"
        with pytest.raises(InputError, match=f"{said}|holds other files"):
            RunFolder(inner_path).check(ToolExpanderConfig(output_dir=str(inner_path)))
    (tmp_path / "link").symlink_to(run.path)
    with pytest.raises(InputError, match="is inside"):
        RunFolder(tmp_path / "link" / "new").check(ToolExpanderConfig())


# ---- lines of the logs


@pytest.mark.parametrize(
    "line",
    [
        '{"event": "probe", "step": 2, "rows": 8}',
        '{"event": "probe", "step": 2, "rows": -8, "hard": 3}',
        '{"event": "probe", "step": 2, "rows": 8, "hard": "3"}',
        '{"event": "step", "step": 3, "reward": "high"}',
        '{"event": "step", "step": 3, "kl": 1e400}',
        '{"event": "step", "step": 3, "grad_norm": true}',
        '{"event": "eval", "step": 2, "accuracy": "x"}',
        '{"event": "eval", "step": 2, "accuracy": 1e308}',
        '{"event": "eval", "step": 2}',
        '{"event": "eval", "step": 2, "accuracy": 1%s}' % ("0" * 400),
        '{"event": "data", "step": -5}',
        '{"event": "step", "step": 2}',
        '{"event": "step", "step": 1}',
        '{"event": "eval", "step": 0, "accuracy": 1}',
        '{"event": "step", "step": 3, "round": null}',
        '{"event": %s' % ("[" * 200_000),
    ],
    ids=lambda line: line[:70],
)
def test_a_line_that_cannot_be_drawn_or_compared_is_damaged(run, line):
    for step in (1, 2):
        run.log("step", step, {}, reward=0.5, kl=None)
    whole = (run.path / "metrics.jsonl").read_bytes()
    bad = whole + line.encode() + b"\n"
    (run.path / "metrics.jsonl").write_bytes(bad)
    (run.path / "summary.json").write_text("{}")
    for read in (
        lambda: write_curves(run.path),
        lambda: run.forget_after(run.marks()),
        lambda: read_run(run.path),
    ):
        with pytest.raises(InputError, match=r"metrics.jsonl, line 4, is damaged: re"):
            read()
    assert (run.path / "metrics.jsonl").read_bytes() == bad
    kept = run.marks() | {"metrics.jsonl": (3, zlib.crc32(whole))}
    run.forget_after(kept)
    assert (run.path / "metrics.jsonl").read_bytes() == whole


def test_a_line_changed_before_the_checkpoints_place_is_refused(run):
    """A line that is there twice would push the last one out of those counted."""
    for step in (1, 2):
        run.log("notice", step, {}, name="a")
        run.log_rollout(step=step)
    kept = run.marks()
    for name in kept:
        path = run.path / name
        whole = path.read_bytes()
        first, *others = whole.splitlines(keepends=True)
        for changed in (
            [first, first, *others],
            [*others, first],
            [first.replace(b"0", b"1").replace(b"1", b"7"), *others],
        ):
            path.write_bytes(b"".join(changed))
            if path.read_bytes() == whole:
                continue
            before = contents(run.path)
            with pytest.raises(InputError, match=f"{name} has changed in the [23] lines that the checkpoint counts"):
                run.forget_after(kept)
            assert contents(run.path) == before
        path.write_bytes(whole)
    assert run.forget_after(kept) == ""


def test_the_fields_of_a_whole_run_are_read(finished):
    assert len(RunFolder(finished[0]).metrics()) > 10
    assert read_run(finished[0]).finished
    with pytest.raises(ValueError, match="no object"):
        metrics.read_object("[]")


# ---- sentences


def test_deep_nesting_is_damage(run):
    deep = '{"a": ' + "[" * 200_000
    (run.path / "checkpoint-2" / "state.json").write_text(deep)
    with pytest.raises(InputError, match="has no readable state.json"):
        checkpoint.check_whole(run.path / "checkpoint-2")
    (run.path / "summary.json").write_text(deep)
    with pytest.raises(InputError, match=r"summary\.json is damaged"):
        read_run(run.path)


@pytest.mark.parametrize("version", ['"5"', "5.0", "null", "[5]"])
def test_a_format_that_is_no_number_is_damage(run, version):
    (run.path / "checkpoint-2" / "state.json").write_text(f'{{"format": {version}}}')
    with pytest.raises(checkpoint.DamagedError, match=r"no readable state.json \(its format is no number\)"):
        checkpoint.check_whole(run.path / "checkpoint-2")


def test_how_a_stopped_run_goes_on(run):
    assert run.way_on() == f"--resume continues from {run.path}/checkpoint-2"
    for path in checkpoints(run.path):
        shutil.rmtree(path)
    assert run.way_on() == "nothing was saved yet, so --overwrite starts it again"
    run.log("step", 3, {})
    assert run.way_on().startswith(f"{run.path} has logged 3 steps and holds no checkpoint: put its last")
    shutil.rmtree(run.path)
    assert run.way_on() == "no run had begun, so the same command starts it"


def test_an_interrupt_names_no_checkpoint_where_none_is(tmp_path, monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(rows, "load_rows", interrupted)
    assert commands.main(["train", "--output_dir", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err == "toolx train: interrupted: no run had begun, so the same command starts it.\n"
    monkeypatch.setattr(commands, "_run", interrupted)  # while it is imported
    assert commands.main(["train"]) == 130 and capsys.readouterr().err == "toolx train: interrupted.\n"


def test_a_step_before_train_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"No run has begun in .*run: call train\(\), which calls step\(\) itself"):
        make_trainer(tmp_path / "run").step()
    assert not (tmp_path / "run").exists()


def test_settings_of_a_run_are_most_settings(run):
    """Also those of a version with a few settings less, and more of its own."""
    kept = dict([*run.config().items()][20:]) | {"old": 1}
    (run.path / "config.yaml").write_text(yaml.safe_dump(kept))
    (run.path / "metrics.jsonl").unlink()
    assert run.holds_run()
