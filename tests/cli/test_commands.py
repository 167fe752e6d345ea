"""The command line as a user types it: whole small jobs, and bad input that ends in one sentence and exit code 2."""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from toolx_kernels.cli.commands import main
from toolx_kernels.cli.evaluate import held_out_fraction, settings_of_run
from toolx_kernels.cli.train import parse_train
from toolx_kernels.engine import RolloutEngine
from toolx_kernels.models.load import load_model
from toolx_kernels.train.config import ToolExpanderConfig

TINY = [
    "--train_rows", "16", "--eval_rows", "8", "--prompts-per-step", "8", "--num_generations", "2", "--max_steps", "1",
    "--max_completion_length", "16", "--cold_start_steps", "2", "--cold_start_batch_size", "4", "--probe_rollouts", "1",
]  # fmt: skip


ROW = {"prompt": "p", "tools": [{"name": "f", "parameters": {"type": "object", "properties": {}}}], "answer": []}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def toolx(*argv):
    try:
        return main([str(word) for word in argv])
    except SystemExit as stop:  # argparse
        return stop.code


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert toolx("train", *TINY, "--output_dir", folder) == 0
    return folder


def test_train_writes_its_results_and_says_where(run_folder, tmp_path, capsys):
    assert toolx("train", *TINY, "--output_dir", tmp_path / "again") == 0
    out = capsys.readouterr().out
    assert "held out from training" in out and "again/summary.json" in out
    summary = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert summary["steps"] == 1 and summary["eval_rows"] == 8


def test_eval_scores_a_run_folder(run_folder, tmp_path, capsys):
    scores = tmp_path / "scores"
    code = toolx("eval", "--model", run_folder, "--eval_rows", 8, "--max_completion_length", 16, "--output", scores)
    assert code == 0
    out = capsys.readouterr().out
    printed = next(line.split() for line in out.splitlines() if line.startswith("builtin "))
    written = json.loads((scores / "scores.json").read_text())["scores"]["builtin"]
    assert written["parts"].keys() == {"easy", "hard", "parallel", "convention"} and written["n"] == 8
    assert printed[1:3] == ["8", str(written["right"])]
    assert float(printed[3]) == pytest.approx(written["accuracy"], abs=1e-4)
    assert len((scores / "answers.jsonl").read_text().splitlines()) == 8 and "builtin" in out
    assert toolx("eval", "--model", run_folder, "--output", scores) == 2, "results are not overwritten"


def test_eval_of_several_datasets_with_samples(run_folder, tmp_path, capsys):
    others, scores = tmp_path / "others.jsonl", tmp_path / "scores"
    long = {**ROW, "prompt": "x " * 5000, "id": "long"}
    others.write_text(
        lines(*[{**ROW, "prompt": f"say {word}", "category": "talk"} for word in "one two".split()], long)
    )
    flags = ["--model", run_folder, "--dataset", "builtin", others, "--eval_rows", 4, "--max_completion_length", 8]
    flags += ["--num_generations", 3, "--temperature", 0.9, "--k", 1, 3, "--seed", 5]
    assert toolx("eval", *flags, "--output", scores) == 0
    out = capsys.readouterr().out
    assert "pass@3" in out and "1 of 3 prompts do not fit the model's context and count as wrong: long." in out
    assert "temperature 0.9, seed 5" in out
    written = json.loads((scores / "scores.json").read_text())
    of_others = written["scores"][str(others)]
    assert (of_others["n"], of_others["samples"], of_others["parts"]["talk"]["n"]) == (3, 3, 2)
    assert of_others["too_long"] == ["long"] and written["settings"]["seed"] == 5
    assert of_others["pass_at"]["1"]["value"] == pytest.approx(of_others["accuracy"])
    assert toolx("eval", *flags, "--output", tmp_path / "again") == 0
    assert (tmp_path / "again" / "answers.jsonl").read_text() == (scores / "answers.jsonl").read_text()


def test_an_interrupted_eval_leaves_nothing(run_folder, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(RolloutEngine, "generate", interrupted)
    assert toolx("eval", "--model", run_folder, "--eval_rows", 4, "--output", tmp_path / "scores") == 130
    assert list(tmp_path.iterdir()) == []


def test_memory_that_runs_out_anywhere_is_one_sentence(run_folder, monkeypatch, capsys):
    def fails(error):
        monkeypatch.setattr(RolloutEngine, "generate", lambda *_, **__: (_ for _ in ()).throw(error))

    fails(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"))
    assert toolx("eval", "--model", run_folder, "--eval_rows", 4) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("toolx eval: memory ran out (CUDA error: out of memory): toolx plan")
    fails(RuntimeError("device-side assert"))
    with pytest.raises(RuntimeError, match="device-side"):
        toolx("eval", "--model", run_folder, "--eval_rows", 4)


def test_the_recipe_is_the_tiny_models_whatever_its_seed():
    assert parse_train(["--model", "tiny:3"]) == replace(parse_train([]), model="tiny:3")


def test_a_jsonl_dataset_trains_and_evaluates(tmp_path, capsys):
    tool = {"name": "find_hotel", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    rows = [
        {
            "prompt": f"find the hotel in {city}",
            "tools": [tool],
            "answer": [{"name": "find_hotel", "arguments": {"city": city}}],
        }
        for city in "Rome Oslo Bern Lima Kiev Riga Doha Baku Cork Pisa Nara Mali".split()
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--prompts-per-step", 4, "--num_generations", 2, "--max_steps", 1, "--max_completion_length", 8]
    arguments += ["--cold_start_steps", 2, "--cold_start_batch_size", 4, "--probe_rollouts", 1]
    assert toolx("train", "--dataset", path, *arguments, "--output_dir", tmp_path / "run") == 0
    said = f"{path}: 12 rows in the form of toolx (prompt, tools, answer)"
    assert said in capsys.readouterr().err.splitlines()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["train_rows"] + summary["eval_rows"] == 12 and summary["eval_rows"] > 0
    for split, count in (("all", 12), ("held-out", summary["eval_rows"])):
        scores = tmp_path / split
        arguments = ["--dataset", path, "--model", tmp_path / "run", "--max_completion_length", 8, "--output", scores]
        assert toolx("eval", *arguments, "--split", split) == 0
        assert said in capsys.readouterr().err.splitlines()
        assert json.loads((scores / "scores.json").read_text())["scores"][str(path)]["n"] == count


def test_eval_says_what_of_the_generation_config_is_not_applied(tmp_path, capsys):
    model, tokenizer = load_model("tiny")
    model.generation_config.repetition_penalty = 1.1
    model.generation_config.suppress_tokens = [7]
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    scored = ["--eval_rows", 2, "--max_completion_length", 4]
    assert toolx("eval", "--model", tmp_path / "model", *scored) == 0
    assert "generation_config names repetition_penalty=1.1, suppress_tokens=[7], which" in capsys.readouterr().out
    assert toolx("eval", "--model", "tiny", *scored) == 0
    assert "generation_config" not in capsys.readouterr().out


def test_the_form_of_calls_and_the_templates_arguments_are_flags(tmp_path, capsys):
    """Of a run, of a plan and of an evaluation, which takes the run's."""
    flags = [
        "--tool_format",
        "json",
        "--overlong",
        "drop",
        "--max_steps",
        1,
        "--cold_start_steps",
        1,
        "--train_rows",
        8,
        "--eval_rows",
        2,
    ]
    flags += ["--max_completion_length", 8, "--prompts_per_step", 2, "--num_generations", 2, "--probe_rollouts", 1]
    assert toolx("train", *flags, "--output_dir", tmp_path / "run") == 0
    assert "calls: json, with our own tool prompt" in capsys.readouterr().out
    assert toolx("eval", "--model", tmp_path / "run", "--eval_rows", 2, "--max_completion_length", 4) == 0
    assert "calls as json" in capsys.readouterr().out
    misspelt = ["--chat_template_kwargs", '{"enable_thinking": false}']
    for command in (["train", "--output_dir", tmp_path / "new"], ["plan", "--device", "cpu"], ["eval"]):
        model = [] if command[0] != "eval" else ["--model", "tiny"]
        assert toolx(*command, *model, *misspelt) == 2
        assert "does not read 'enable_thinking'" in capsys.readouterr().err
    assert toolx("train", "--chat_template_kwargs", "thinking", "--output_dir", tmp_path / "new") == 2
    assert "chat_template_kwargs='thinking' must be a JSON object" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_doctor_speaks(capsys):
    assert toolx("doctor") == 0
    out = capsys.readouterr().out
    assert "kv_write" in out and "linear_logprob" in out and "paged_attention" in out


def test_help_names_every_command(capsys):
    assert toolx("--help") == 0
    helped = capsys.readouterr().out
    assert toolx() == 2 and capsys.readouterr().out == helped
    for command in ("train", "eval", "compare", "plan", "doctor"):
        assert f"    {command} " in helped


@pytest.mark.parametrize("argv, code", [(["--version"], 0), (["train", "--help"], 0), (["eval", "--k", "0"], 2)])
def test_flags_are_read_without_torch(argv, code):
    """So that help comes at once, and torch finds the environment that the command sets."""
    script = "import sys; from toolx_kernels.cli.commands import main\n"
    script += "try: code = main(sys.argv[1:])\nexcept SystemExit as stop: code = stop.code\n"
    script += "print(code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == f"{code} False False"


def test_the_module_is_the_command():
    run = subprocess.run([sys.executable, "-m", "toolx_kernels.cli", "fly"], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and run.stderr.startswith("toolx: ")


def test_both_values_of_a_switch_can_be_typed():
    def switches(*argv):
        config = parse_train([*argv])
        return config.eval_on_start, config.gradient_checkpointing

    assert switches() == (True, False) and switches("--gradient-checkpointing") == (True, True)
    assert switches("--no_eval_on_start", "--gradient_checkpointing", "no") == (False, False)
    assert switches("--no-eval-on-start") == switches("--eval_on_start=False") == (False, False)
    assert switches("--eval_on_start", "--gradient_checkpointing=true") == (True, True)


def test_flags_beat_the_config_file_which_beats_the_defaults(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"learning_rate": 3e-4, "epsilon": 0.1, "epsilon_high": None, "overwrite": True}))
    args = parse_train(["--config", str(path), "--epsilon", "0.15"])
    assert (args.learning_rate, args.epsilon, args.epsilon_high, args.overwrite) == (3e-4, 0.15, None, True)
    assert parse_train(["--config", str(path), "--epsilon-high=0.3"]).epsilon_high == 0.3
    builtin = parse_train([])
    assert builtin.learning_rate > 1e-5 and builtin.cold_start_steps > 0
    assert args.cold_start_steps == builtin.cold_start_steps, "the tiny model's recipe lies under a user's file"
    assert parse_train(["--model", "smollm2-135m"]).learning_rate == ToolExpanderConfig().learning_rate
    facts = parse_train(["--dataset", "builtin-facts"])
    assert facts == parse_train(["--config", "builtin-facts"]) and facts.train_rows == 320
    path.write_text("learning_rate: 5e-4")  # text to YAML 1.1
    assert parse_train(["--config", str(path)]).learning_rate == 5e-4
    twice = parse_train(["--config", "replace", "--config", str(path)])
    assert (twice.beta, twice.learning_rate) == (1e-3, 5e-4)


def test_a_run_can_be_repeated_from_the_config_it_wrote(run_folder):
    written = yaml.safe_load((run_folder / "config.yaml").read_text())
    again = parse_train(["--config", str(run_folder / "config.yaml")])
    assert {name: getattr(again, name) for name in written} == written


BAD_FLAGS = [
    (["train", "--nope", "3"], "--nope"),
    (["train", "--learning_rate", "fast"], "learning_rate"),
    (["train", "--learning_rate", "-1"], "learning_rate=-1.0 must be positive and finite"),
    (["train", "--learning_rate", "-1e-4"], "learning_rate=-0.0001 must be positive and finite"),
    (["train", "--learning_rate", "-.5E3"], "learning_rate=-500.0 must be positive and finite"),
    (["train", "--weight_decay", "-inf"], "weight_decay=-inf must lie in"),
    (["train", "--reward_weights", "1", "-nan"], "reward_weights=nan must be finite"),
    (["train", "--max_steps", "1" + "0" * 5000], "..."),
    (["train", "--train_rows", "1000000"], "train_rows=1000000: a built-in task generates at most 100,000 rows"),
    (["train", "--per_device_train_batch_size", "8"], "--per_device_train_batch_size: it is TRL's, and docs/from-trl"),
    (["train", "--max_prompt_length", "8"], "unknown flag --max_prompt_length: it is TRL's, and docs/from-trl.md says"),
    (["train", "--use-vllm"], "unknown flag --use_vllm: it is TRL's"),
    (["train", "--bf16", "true"], "unknown flag --bf16: it is TRL's"),
    (["train", "--gradient_accumulation_steps=4"], "unknown flag --gradient_accumulation_steps: it is TRL's"),
    (["plan", "--logging_steps", "1"], "unknown flag --logging_steps: it is TRL's"),
    (["train", "--use_pefft", "true"], "unknown flag --use_pefft: did you mean --use_peft?"),
    (["train", "--num_generations", "1"], "num_generations=1"),
    (["train", "--max_steps", "0"], "max_steps=0"),
    (["train", "--hard_sampling", "some"], "hard_sampling"),
    (["train", "--resume", "--overwrite"], "resume=True keeps the run that overwrite=True deletes"),
    (["train", "--resume", "maybe"], "'maybe' is neither true nor false"),
    (["train", "--config", "no-such-recipe"], "no-such-recipe"),
    (["train", "--device", "tpu9"], "tpu9"),
    (["train", "--dataset", ""], "train: --dataset: '' is empty: give a name, or leave it out."),
    (["plan", "--model", ""], "plan: --model: '' is empty: give a name, or leave it out."),
    (["train", "--chat_template_kwargs", '[\n"a"]'], """chat_template_kwargs='[\\n"a"]' must be a JSON object"""),
    (["train", "--device", "meta"], "meta"),
    (["train", "--top_p", "0"], "top_p=0.0"),
    (["train", "--adam_beta2", "1"], "adam_beta2=1.0"),
    (["train", "--seed", "99999999999999999999"], "seed=99999999999999999999"),
    (["train", "--learning_rate", "inf"], "learning_rate=inf"),
    (["train", "--conf", "builtin"], "--conf"),
    (["train", "--model", "no/such-model"], "no/such-model"),
    (["train", "--model", "./no-such-folder"], "./no-such-folder"),
    (["train", "--model", "missing.gguf"], "missing.gguf"),
    (["train", "--dataset", "bfcl:cooking"], "cooking"),
    (["train", "--dataset", "missing.jsonl"], "missing.jsonl"),
    (["train", "--dataset", "no/such-dataset"], "no/such-dataset"),
    (["eval", "--model", "no/such-model"], "no/such-model"),
    (["eval"], "There is no run in runs/builtin"),
    (["eval", "--model", "tiny", "--dataset", "bfcl:cooking"], "cooking"),
    (["eval", "--model", "tiny", "--eval_rows", "0"], "--eval_rows 0 must be at least 1 and at most 1,000,000"),
    (["eval", "--model", "tiny", "--eval_rows", "1" + "0" * 12], "--eval_rows 1000000000000 must be at least 1 and at"),
    (["eval", "--model", "tiny", "--max_completion_length", "9" * 12], "--max_completion_length 999999999999 must be"),
    (["eval", "--model", "tiny", "--num_generations", "9" * 9, "--temperature", "1"], "at least 1 and at most 4,096"),
    (["eval", "--model", "tiny", "--seed", "9" * 30], "--seed 999999999999999999999999999999 must lie in"),
    (["eval", "--model", "tiny", "--eval_fraction", "nan"], "--eval_fraction nan must lie between 0 and 1"),
    (["eval", "--model", "tiny", "--temperature", "1e400"], "temperature=inf must be 0 (greedy), or from 1e-30"),
    (["eval", "--model", "tiny", "--max_completion_length", "0"], "--max_completion_length 0"),
    (["eval", "--model", "tiny", "--eval_fraction", "1"], "--eval_fraction 1.0"),
    (["eval", "--model", "tiny", "--num_generations", "0"], "num_generations=0 must be at least 1"),
    (["eval", "--model", "tiny", "--num_generations", "4"], "num_generations=4 greedy completions would all be"),
    (["eval", "--model", "tiny", "--k", "0"], "pass@0"),
    (["eval", "--model", "tiny", "--k", "2"], "pass@2 needs a k from 1 to num_generations=1"),
    (["eval", "--model", "tiny", "--num_generations", "4", "--temperature", "1", "--k", "5"], "pass@5"),
    (["eval", "--model", "tiny", "--temperature", "-1"], "temperature=-1.0"),
    (["eval", "--model", "tiny", "--seed", "-1"], "--seed -1"),
    (["eval", "--model", "tiny", "--dataset", "builtin", "builtin"], "--dataset names builtin twice"),
    (["eval", "--model", "tiny", "--output", "{file}"], "is a file"),
    (["eval", "--model", "tiny", "--output", "{folder}"], "holds files already"),
]


@pytest.mark.parametrize("argv, named", BAD_FLAGS, ids=[" ".join(argv)[:80] for argv, _ in BAD_FLAGS])
def test_bad_flags(argv, named, tmp_path, capsys, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    file = tmp_path / "file"
    file.write_text("")
    assert toolx(*(word.format(file=file, folder=tmp_path) for word in argv)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert named in error and len(error) < 500
    assert list(here.iterdir()) == [], "nothing may be written"


BAD_FILES = {
    "empty": ("", "holds no rows"),
    "no prompt": (lines(ROW, {k: v for k, v in ROW.items() if k != "prompt"}), "'prompt'"),
    "no tools": (lines({k: v for k, v in ROW.items() if k != "tools"}), "'tools'"),
    "tools that are no schemas": (lines(ROW | {"tools": [{"name": "f", "parameters": {"type": "banana"}}]}), "banana"),
    "not JSON": (lines(ROW) + "{oops\n", "rows.jsonl"),
    "a prompt beyond the context": (lines(*[ROW | {"prompt": f"{i} " + "x " * 3000} for i in range(30)]), "context"),
    "too few to split": (lines(ROW), "eval_fraction"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, named = BAD_FILES[name]
    (tmp_path / "rows.jsonl").write_text(content)
    assert toolx("train", "--dataset", "rows.jsonl") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("toolx train: ") and named in error
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_an_output_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert toolx("train", *TINY, "--output_dir", tmp_path / "file" / "run") == 2
    assert str(tmp_path / "file") in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_second_run_into_the_same_folder_is_refused(run_folder, capsys):
    assert toolx("train", *TINY, "--output_dir", run_folder) == 2
    assert "--resume" in capsys.readouterr().err


def write_run(folder, **settings):
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "metrics.jsonl").write_text('{"event": "data", "step": 0, "timing": {}}\n')


def test_eval_takes_settings_of_our_runs_only(tmp_path, monkeypatch):
    """A stranger's config.yaml is nobody's: where the command is given, in a model's folder, or beside it."""
    monkeypatch.chdir(tmp_path)
    for content in ("self_exemplify: true", "[not, a, mapping", "decoder: {layers: 2}"):
        Path("config.yaml").write_text(content)
        Path("model").mkdir(exist_ok=True)
        Path("model/config.yaml").write_text(content)
        for log in ("", "3.5\n", "[" * 100_000, '{"loss": 1.5}\n', "step,loss\n"):
            Path("metrics.jsonl").write_text(log)
            Path("model/metrics.jsonl").write_text(log)
            assert settings_of_run("tiny") == settings_of_run("model") == {}
    write_run(tmp_path / "run", max_completion_length=512)
    for name in ("checkpoint-3", "model"):
        Path("run", name).mkdir()
    Path("run/checkpoint-3/state.json").write_text("{}")
    assert settings_of_run("run") == settings_of_run("run/checkpoint-3") == {"max_completion_length": 512}
    assert settings_of_run("run/model") == {}


@pytest.mark.parametrize(
    ("settings", "flags", "named"),
    [
        ({"eval_dataset": "other.jsonl"}, [], "held out no rows of its dataset: give --dataset other.jsonl"),
        ({"eval_fraction": 0.1}, ["--eval_fraction", "0.2"], "0.2: the run of {run} held out only 0.1"),
    ],
)
def test_eval_calls_no_rows_held_out_that_the_run_was_trained_on(settings, flags, named, tmp_path, capsys):
    write_run(tmp_path / "run", **settings)
    arguments = ["--model", tmp_path / "run", "--dataset", tmp_path / "rows.jsonl", "--split", "held-out", *flags]
    assert toolx("eval", *arguments) == 2
    assert named.format(run=tmp_path / "run") in capsys.readouterr().err


def test_eval_holds_out_what_the_run_did():
    args = argparse.Namespace(model="run", eval_fraction=None)
    assert held_out_fraction(args, {"eval_fraction": 0.1}) == 0.1 and held_out_fraction(args, {}) == 0.2
    args.eval_fraction = 0.05
    assert held_out_fraction(args, {"eval_fraction": 0.1}) == held_out_fraction(args, {}) == 0.05


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """Saves a tiny random model of a kind, with the tiny tokenizer, and says where."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from toolx_kernels.models.tiny import tiny_tokenizer

    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)
    tokenizer, folder = tiny_tokenizer(), tmp_path_factory.mktemp("models")

    def saved(kind, **settings):
        config = AutoConfig.for_model(kind, **sizes, vocab_size=len(tokenizer), eos_token_id=1, **settings)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)
        return folder / kind

    return saved


@pytest.mark.parametrize(
    "kind, settings, reason",
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "its Lfm2ShortConv (layers.0.conv) carries state"),
        ("mamba", {}, "it does not take its attention function from transformers' registry"),
    ],
)
def test_models_that_cannot_be_run_exactly_are_refused_everywhere(
    kind, settings, reason, model_folder, tmp_path, capsys
):
    folder = model_folder(kind, **settings)
    for command, *flags in (["plan"], ["eval", "--eval_rows", 2], ["train", *TINY, "--output_dir", tmp_path / "run"]):
        assert toolx(command, "--model", folder, *flags) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(f"toolx {command}: ") and reason in last and "docs/models.md" in last
    assert not (tmp_path / "run").exists()


def test_prompts_stay_within_the_original_context_of_longrope(model_folder, tmp_path, capsys):
    factors = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 8, long_factor=[8.0] * 8)
    limits = dict(max_position_embeddings=2048, original_max_position_embeddings=20)
    folder = model_folder("phi3", intermediate_size=32, rope_parameters=factors, **limits)
    for command, *flags in (["plan"], ["train", *TINY, "--output_dir", tmp_path / "run"]):
        assert toolx(command, "--model", folder, *flags) == 2
        assert "context" in (last := capsys.readouterr().err.splitlines()[-1])
        assert "20 (the original one of its LongRoPE factors; those to 2048 are not used)" in last


def test_a_run_with_experts_says_so(model_folder, tmp_path, capsys):
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=16)
    folder = model_folder("qwen3_moe", **experts)
    flags = "--train_rows 2 --eval_rows 2 --prompts_per_step 2 --num_generations 2 --max_steps 1 --cold_start_steps 0"
    settings = ["--max_completion_length", 4, "--hard_sampling", "none", "--output_dir", tmp_path / "run"]
    assert toolx("train", "--model", folder, *flags.split(), *settings) == 0
    assert "model: a mixture of experts: in bfloat16" in capsys.readouterr().out
