"""Settings from YAML files and recipes, with the file and line of what is wrong; the run folder where none is named."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from tests.cli.test_commands import TINY, toolx
from toolx_kernels.cli.evaluate import DEFAULT_MODEL
from toolx_kernels.cli.recipes import read_recipe
from toolx_kernels.cli.train import announcement, default_folder, describe, parse_train
from toolx_kernels.errors import InputError


def test_flags_beat_files_and_later_files_beat_earlier_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("one.yaml").write_text("learning_rate: 1.0e-4\nepsilon: 0.1\nseed: 3\n")
    Path("two.yaml").write_text("epsilon: 0.12\nseed: 4\n")
    config = parse_train(["--config", "one.yaml", "two.yaml", "--seed", "5"])
    assert (config.learning_rate, config.epsilon, config.seed) == (1e-4, 0.12, 5)
    assert read_recipe("two.yaml").places == {"epsilon": "two.yaml, line 1", "seed": "two.yaml, line 2"}


BAD_YAML = [
    ("seed: 1\n\nlearning_rat: 1", "mine.yaml, line 3: 'learning_rat' is not a setting: did you mean learning_rate?"),
    ("lear: 1", "mine.yaml, line 1: 'lear' is not a setting: did you mean learning_rate?"),
    (
        "seed: 1\ndtype: float32\nseed: 2",
        "mine.yaml, line 3: 'seed' is set twice, first in mine.yaml, line 1: leave one",
    ),
    ("1: 2\nx: 3", "mine.yaml, line 1: '1' is not a setting: see toolx train --help."),
    ("- a", "mine.yaml must have one setting per line, as 'learning_rate: 0.0005'."),
    ("", "mine.yaml must have one setting per line, as 'learning_rate: 0.0005'."),
    (
        "seed: 1\n  x: [",
        "mine.yaml, line 2 is not YAML (mapping values are not allowed here): write settings as 'learning",
    ),
    ("seed: 1\ndate: 2026-02-30", "mine.yaml, line 2 is not YAML (day is out of range for month): write settings as"),
    ("seed: 1\nlearning_rate: null", "mine.yaml, line 2: learning_rate=None must be a number."),
    ("hard_sampling: null", "mine.yaml, line 1: hard_sampling=None is unknown: did you mean none?"),
    ("hard_sampling: retyr", "mine.yaml, line 1: hard_sampling='retyr' is unknown: did you mean retry?"),
    ("# mine\nnum_generations: 2.5", "mine.yaml, line 2: num_generations=2.5 must be a whole number."),
    ("num_generations: 1", "mine.yaml, line 1: num_generations=1 has no siblings"),
    ("overwrite: 1", "mine.yaml, line 1: overwrite=1 must be true or false."),
    ("epsilon: [0.2]", "mine.yaml, line 1: epsilon=[0.2] must be a number."),
    (
        "epsilon: -1",
        "mine.yaml, line 1: epsilon=-1.0 must lie in [0, 1), as the lower clip is 1 - epsilon.",
    ),  # as the loss says
    ("seed: 1\ntop_p: 0", "mine.yaml, line 2: top_p=0.0 must lie in (0, 1]"),  # as the sampler says
    (
        "seed: 1\nper_device_train_batch_size: 8",
        "mine.yaml, line 2: 'per_device_train_batch_size' is not a",
    ),  # it is TRL's
    ("seed: 1\nprompts_per_step: 999999999999", "mine.yaml, line 2: prompts_per_step=999999999999 must be at"),
    ("device: tpu9", "mine.yaml, line 1: device='tpu9' is unknown"),
    ("model: 5", "mine.yaml, line 1: model=5 must be text."),
    ("resume: true\noverwrite: true", "mine.yaml, line 1 and mine.yaml, line 2: resume=True keeps the run"),
]


@pytest.mark.parametrize("text, said", BAD_YAML, ids=[text for text, _ in BAD_YAML])
def test_a_fault_in_a_file_is_told_with_its_line(text, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        parse_train(["--config", "replace", "mine.yaml"])
    assert str(error.value).startswith(said)


def test_what_is_not_text_is_no_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="mine.yaml is not YAML .*: write settings as"):
        parse_train(["--config", "mine.yaml"])


def test_a_value_that_is_typed_is_not_of_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("learning_rate: -1\nhard_sampling: retry\n")
    with pytest.raises(InputError, match=r"^learning_rate=-2.0 must"):
        parse_train(["--config", "mine.yaml", "--learning_rate", "-2"])
    with pytest.raises(InputError, match=r"^mine.yaml, line 2: hard_sampling=retry draws"):
        parse_train(["--config", "mine.yaml", "--learning_rate", "1", "--demonstrations", "better"])
    with pytest.raises(
        InputError, match=r"^recipe distill, line 2: old_logprobs=sampler .* hard_sampling=distill learns"
    ):
        parse_train(["--config", "distill", "--old_logprobs", "sampler"])


def test_a_value_of_a_resumed_run_is_not_of_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "num_generations" in read_recipe("builtin").settings
    Path("runs/builtin").mkdir(parents=True)
    Path("runs/builtin/config.yaml").write_text("num_generations: 1\n")
    Path("runs/builtin/metrics.jsonl").write_text('{"event": "data", "step": 0, "timing": {}}\n')
    with pytest.raises(InputError, match=r"^num_generations=1 has"):
        parse_train(["--resume"])


@pytest.mark.parametrize(
    "recipes, dataset, folder",
    [
        ([], "builtin", "builtin"),
        ([], "builtin-facts", "builtin-facts"),
        ([], "rows.jsonl", "rows"),
        ([], "../my data/all rows.v2.jsonl", "all-rows.v2"),
        ([], "bfcl:simple_python", "bfcl-simple_python"),
        ([], "seal-tools:data/seal/train.json", "seal-tools-train"),
        ([], "Team-ACE/ToolACE", "ToolACE"),
        ([], "a.jsonl, b.jsonl", "a-b"),
        ([], "..", "run"),
        (["grpo"], "rows.jsonl", "grpo"),
        (["builtin-facts", "retry"], "builtin", "builtin-facts-retry"),
        (["configs/mine.yaml", "../other.yml"], "builtin", "mine-other"),
    ],
)
def test_the_run_folder_where_none_is_named(recipes, dataset, folder):
    assert default_folder(recipes, dataset) == f"runs/{folder}"


def test_a_named_run_folder_counts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("output_dir: there\ndataset: rows.jsonl\n")
    Path("other.yaml").write_text("output_dir: null\ndataset: rows.jsonl\n")
    assert parse_train(["--config", "mine.yaml"]).output_dir == "there"
    assert parse_train(["--config", "mine.yaml", "--output_dir", "here"]).output_dir == "here"
    assert parse_train(["--config", "other.yaml"]).output_dir == "runs/other"
    assert parse_train(["--dataset", "rows.jsonl"]).output_dir == "runs/rows"
    assert parse_train([]).output_dir == DEFAULT_MODEL == "runs/builtin", "which toolx eval looks for"


def test_a_run_says_what_it_will_do(tmp_path, monkeypatch):
    def said(*argv):
        config = parse_train([*argv])
        return announcement(config, [argv[1]] if argv[:1] == ("--config",) else [])

    assert said() == "Training tiny on builtin, settings of builtin, into runs/builtin."
    assert said("--config", "grpo") == "Training tiny on builtin, settings of builtin, then grpo, into runs/grpo."
    assert said("--model", "m", "--dataset", "rows.jsonl", "--reward_funcs", "r.py:f", "m.g") == (
        "Training m on rows.jsonl, rewarded by r.py:f, m.g, default settings, into runs/rows."
    )
    assert said("--resume", "--output_dir", "runs/x") == "Resuming runs/x: tiny on builtin."


REWARD = """\
import helper_of_rewards

def short(prompts, completions, completion_ids, **columns):
    return [helper_of_rewards.SCALE / (1 + len(ids)) for ids in completion_ids]
"""


def test_a_run_is_resumed_by_the_same_words_with_the_same_reward_functions(tmp_path, monkeypatch, capsys):
    """No run folder is named, and the resumed run is told of nothing but its recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("run_rewards.py").write_text(REWARD)
    Path("helper_of_rewards.py").write_text("SCALE = 2.0\n")
    Path("mine.yaml").write_text("log_completions: 0\n")
    assert toolx("train", "--config", "mine.yaml", *TINY, "--reward_funcs", "run_rewards.py:short") == 0
    assert capsys.readouterr().out.startswith("Training tiny on builtin, rewarded by run_rewards.py:short, settings")
    assert toolx("train", "--config", "mine.yaml", "--resume", "--max_steps", 2) == 0
    assert capsys.readouterr().out.startswith("Resuming runs/mine: tiny on builtin, rewarded by run_rewards.py:short.")
    run = tmp_path / "runs" / "mine"
    assert yaml.safe_load((run / "config.yaml").read_text())["reward_funcs"] == [f"{tmp_path}/run_rewards.py:short"]
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["rewards"] for line in steps if line["event"] == "step"]
    assert len(rewards) == 2 and all(each.keys() == {"short"} and 0 < each["short"] <= 1 for each in rewards)
    assert toolx("train", "--config", "mine.yaml", *TINY) == 2
    assert "runs/mine already holds a run: pass --resume" in capsys.readouterr().err
    assert toolx("train", "--config", "mine.yaml", "--resume", "--reward_funcs", "run_rewards.py:other") == 2
    assert "reward_funcs=['run_rewards.py:short'], not ['run_rewards.py:other']" in capsys.readouterr().err


def test_reward_functions_are_loaded_before_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert toolx("train", "--dataset", "missing.jsonl", "--reward_funcs", "missing.py:f") == 2
    assert capsys.readouterr().err.startswith(
        "toolx train: reward_funcs=missing.py:f: there is no Python file missing.py"
    )
    assert list(tmp_path.iterdir()) == []


def test_the_last_lines_of_a_run_are_its_notices_and_where_it_came():
    summary = {
        "eval_before": 1.0, "eval_after": 1.0, "eval_rows": 2, "eval_rows_seen": 0, "steps": 3, "wall_seconds": 1.0,
        "hard_before": 0, "hard_after": 0, "probed_rows": 4, "notices": ["No group had a gradient.", "All cut off."],
    }  # fmt: skip
    *notices, line = describe(parse_train([]), summary).splitlines()
    assert notices == ["notice: No group had a gradient.", "notice: All cut off."]
    assert "held out from training: 1.000 -> 1.000; hard rows 0 -> 0 of 4; 3 steps, 1 s; see " in line
    line = describe(parse_train([]), summary | {"eval_reward_before": None, "eval_reward_after": 0.25})
    assert "1.000 -> 1.000; their mean reward not evaluated -> 0.250; hard rows 0" in line
