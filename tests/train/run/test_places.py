"""Paths in settings: ``~`` is expanded, impossible names are refused, and a run resumes from any working directory."""

import json
import os
from pathlib import Path

import pytest

from toolx_kernels.cli import commands
from toolx_kernels.cli.train import parse_train
from toolx_kernels.compare.arms import arms_of
from toolx_kernels.compare.runs import Run
from toolx_kernels.errors import InputError
from toolx_kernels.models.load import load_model
from toolx_kernels.toolcall import read_dataset
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.named_rewards import named_rewards
from toolx_kernels.train.rows import load_demonstrations, load_rows
from toolx_kernels.train.run.folder import RunFolder
from toolx_kernels.train.run.places import absolute

ROW = {"tools": [{"name": "f", "parameters": {"type": "object", "properties": {}}}], "answer": []}


def write_rows(path, prompts):
    path.write_text("".join(json.dumps(ROW | {"prompt": prompt}) + "\n" for prompt in prompts))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The working directory, with data, a reward function, and a run that began there."""
    folder = tmp_path / "project"
    (folder / "elsewhere").mkdir(parents=True)
    monkeypatch.chdir(folder)
    write_rows(Path("rows.jsonl"), "abc")
    write_rows(Path("more.jsonl"), "de")
    Path("rewards.py").write_text("def one(prompts, **columns):\n    return [1.0] * len(prompts)\n")
    flags = "--dataset rows.jsonl --eval_dataset more.jsonl,rows.jsonl --demonstration_dataset ./more.jsonl"
    run = RunFolder("run")
    config = parse_train([*flags.split(), "--reward_funcs", "rewards.py:one", "--output_dir", "run"])
    run.start(run.settled(config))
    return folder


def test_a_run_goes_on_from_any_working_directory(project, monkeypatch):
    ids = [
        row.id
        for rows in load_rows(parse_train(["--dataset", "rows.jsonl", "--eval_dataset", "more.jsonl"]))
        for row in rows
    ]
    assert ids == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3", "more.jsonl:1", "more.jsonl:2"]
    monkeypatch.chdir("elsewhere")
    config = parse_train(["--resume", "--output_dir", "../run"])
    RunFolder("../run").check(config)
    loaded = [*load_rows(config), load_demonstrations(config)]
    assert [len(rows) for rows in loaded] == [3, 5, 2]
    assert {row.id for rows in loaded for row in rows} == {*ids}, "a run's rows are found again by their ids"
    assert named_rewards(config.reward_funcs)[0](["a"]) == [1.0]
    again = parse_train(["--config", "../run/config.yaml"])
    assert (again.dataset, again.reward_funcs) == (config.dataset, config.reward_funcs)
    for same in ("../rows.jsonl", str(project / "rows.jsonl"), "/mounted/elsewhere/rows.jsonl"):
        RunFolder("../run").check(parse_train(["--resume", "--output_dir", "../run", "--dataset", same]))
    with pytest.raises(InputError, match="run with dataset='rows.jsonl', not 'more.jsonl': resume"):
        RunFolder("../run").check(parse_train(["--resume", "--output_dir", "../run", "--dataset", "../more.jsonl"]))
    with pytest.raises(InputError, match=r"reward_funcs=\['rewards.py:one'\], not \['rewards.py:two'\]"):
        flags = ["--resume", "--output_dir", "../run", "--reward_funcs", "../rewards.py:two"]
        RunFolder("../run").check(parse_train(flags))


def test_what_is_no_path_stays(project):
    for name in ("builtin", "tiny", "simple_python", "org"):
        Path(name).mkdir()
    names = {
        "model": "tiny",
        "dataset": "builtin",
        "eval_dataset": "bfcl:simple_python",
        "reward_funcs": ["os.path.join"],
    }
    kept = absolute(ToolExpanderConfig(**names, demonstration_dataset="org/data, ./more.jsonl").to_dict())
    assert {name: kept[name] for name in names} == names
    assert kept["demonstration_dataset"] == f"org/data,{project}/more.jsonl"
    kept = absolute(ToolExpanderConfig(model="org", dataset="seal-tools:builtin").to_dict())
    assert (kept["model"], kept["dataset"]) == (f"{project}/org", f"seal-tools:{project}/builtin")


def test_runs_of_two_machines_form_one_arm(tmp_path):
    runs = [
        Run(tmp_path / str(seed), {"seed": seed, "dataset": f"/home/{seed}/rows.jsonl", "beta": 0.0}, True, 1)
        for seed in range(2)
    ]
    assert len(arms_of(runs)) == 1
    runs[0].config["dataset"] = "/home/0/others.jsonl"
    assert len(arms_of(runs)) == 2


# ---- names that a user gives


def test_the_home_folder_is_expanded_and_variables_are_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", "ab")
    (tmp_path / "my.yaml").write_text("output_dir: ~/run\ndataset: ~/a.jsonl,~/b.jsonl\neval_dataset: seal-tools:~/d\n")
    config = parse_train(["--config", "~/my.yaml", "--model=~/m", "--reward_funcs=~/r.py:one"])
    assert (config.output_dir, config.model, config.reward_funcs) == (
        f"{tmp_path}/run", f"{tmp_path}/m", [f"{tmp_path}/r.py:one"],
    )  # fmt: skip
    assert config.dataset == f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl"
    assert config.eval_dataset == f"seal-tools:{tmp_path}/d"
    assert len(read_dataset("~/rows.jsonl")) == 2
    user = ToolExpanderConfig(output_dir="~root/x", demonstration_dataset="$HOME/x", dataset="./~x,a~b")
    assert user.output_dir == f"{os.path.expanduser('~root')}/x"
    assert (user.demonstration_dataset, user.dataset) == ("$HOME/x", "./~x,a~b")
    RunFolder(tmp_path / "run").start(config)
    assert parse_train(["--config", "my.yaml", "--resume"]).seed == config.seed
    assert commands.main(["eval", "--model=~/nothing"]) == 2
    assert f"{tmp_path}/nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "setting", ["model", "output_dir", "dataset", "eval_dataset", "demonstration_dataset", "device"]
)
@pytest.mark.parametrize(
    "name, said",
    [
        ("a\0b", r"'a\\x00b' holds '\\x00', which is a control character: give a name without it"),
        ("runs/a\n", r"'runs/a\\n' holds '\\n', which is a control character"),
        ("caf\udce9", r"'caf\\udce9' holds '\\udce9', which is not UTF-8 text"),
        (" ", "' ' is empty: give a name, or leave it out"),
        (
            "~nobody-here/x",
            "'~nobody-here/x' names the home folder ~nobody-here, and there is no such user: write ./~",
        ),
    ],
)
def test_names_that_nothing_can_have(setting, name, said):
    with pytest.raises(InputError, match=f"^{setting}={said}"):
        ToolExpanderConfig(**{setting: name})


def test_impossible_names_are_one_sentence_everywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text('dataset: "a\\0b"\n')
    for argv in (
        ["train", "--config", "my.yaml"], ["train", "--output_dir", "a\0b"], ["train", "--reward_funcs", "a\0b.py:f"],
        ["train", "--config", "a\0b"], ["eval", "--model", "a\0b"], ["eval", "--dataset", "x", "a\0b"],
        ["eval", "--output", "a\0b"], ["compare", "a\0b"], ["compare", "x", "--output", "a\0b"],
        ["plan", "--model", "a\0b"],
    ):  # fmt: skip
        assert commands.main(argv) == 2, argv
        (line,) = capsys.readouterr().err.splitlines()
        assert r"a\x00b" in line and "holds '\\x00', which is a control character" in line, argv
    for work in (lambda: read_dataset("a\0b"), lambda: load_model("a\0b")):
        with pytest.raises(InputError, match="holds '.x00', which is a control character"):
            work()
    for folder in ("", "runs/"):
        with pytest.raises(InputError, match="output_dir has the name ä{40}..., which is too long: choose a shorter"):
            RunFolder(folder + "ä" * 200).check(ToolExpanderConfig())
    write_rows(Path("rows.jsonl"), "a")
    assert sorted(os.listdir()) == ["my.yaml", "rows.jsonl"]
    with pytest.raises(InputError, match="id"):  # 40 times the same rows, not a name of 480 characters
        read_dataset(",".join(["rows.jsonl"] * 40))
