"""Help as a user at a terminal reads it: every flag once, with its default, in 80 columns; words that are misspelt."""

import re
from dataclasses import fields
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from toolx_kernels.cli.commands import COMMANDS, main
from toolx_kernels.cli.parser import Parser, group_name
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.versions import version_of

SECTIONS = {group_name(section): section for section in reversed(ToolExpanderConfig.__bases__)}
SETTINGS = [field.name for field in fields(ToolExpanderConfig)]
KINDS = get_type_hints(ToolExpanderConfig)


@pytest.fixture
def shown(capsys):
    """What a command prints; its help exits with 0."""

    def run(*argv):
        with pytest.raises(SystemExit) as stop:
            main(list(argv))
        assert stop.value.code in (0, None)
        return capsys.readouterr().out

    return run


def test_help_of_train_has_every_setting_once_in_its_group_with_its_default(shown):
    intro, *groups = re.split(r"\n\n([\w-]+): .*\n", shown("train", "--help"))
    assert groups[::2] == list(SECTIONS)
    for section, text in zip(SECTIONS.values(), groups[1::2], strict=True):
        assert re.findall(r"  (--\w+)", text) == [f"--{field.name}" for field in fields(section)]
    text = "".join(groups)
    for line in (
        "--model tiny",
        "--dataset builtin",
        "--output_dir runs/<recipe or dataset>",
        "--num_generations 5",
        "--top_k 0",
        "--eval_on_start true",
        "--learning_rate 1e-06",
        "--tool_format auto",
    ):
        assert re.search(rf"{line}(\s|$)", text), line
    for off in ("--resume", "--train_rows", "--reward_funcs"):
        assert re.search(rf"{off}( {{2,}}|\n)", text), f"{off} has no default"
    assert "--config NAME" in intro and "retry-hint" in intro and "toolx train\n" in intro


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_terminal(shown, command):
    text = shown(command, "--help")
    assert max(map(len, text.splitlines())) <= 80 and len(text.splitlines()) <= 110
    assert "-flag" not in text.replace("--flag", "") and not re.search(r"--\w+-", text), "one spelling of each flag"
    assert "--no_" not in text and not re.search(r"-$", text, re.MULTILINE)


@pytest.mark.parametrize("name", [*SECTIONS, "hard_sampling"])
def test_help_of_a_group_explains_its_settings_alone(shown, name):
    text = shown("train", "--help", name)
    section = SECTIONS[name.replace("_", "-")]
    assert re.findall(r"^  (--\w+)", text, re.MULTILINE) == [f"--{field.name}" for field in fields(section)]
    assert max(map(len, text.splitlines())) <= 80
    plain = " ".join(text.split())
    for field in fields(section):
        assert field.metadata["help"] in plain
        default = {"model": "tiny", "dataset": "builtin", "output_dir": "runs/<recipe or dataset>"}.get(
            field.name, field.default
        )
        default = "true" if default is True else default
        ended = f"{field.metadata['help']} (default: {default})"
        assert (ended in plain) == (default is not None and default is not False), field.name
    assert shown("plan", "--help", name) == text


def test_help_of_all_groups(shown):
    text = shown("train", "--help", "all")
    assert re.findall(r"^  (--\w+)", text, re.MULTILINE) == [f"--{name}" for name in SETTINGS]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_help_of_a_setting_names_its_choices_and_what_none_means(name):
    field, kind = ToolExpanderConfig.__dataclass_fields__[name], KINDS[name]
    text = field.metadata["help"]
    for choice in get_args(kind) if get_origin(kind) is Literal else ():
        assert re.search(rf"(?<![\w-]){re.escape(choice)}(?![\w-])", text), choice
    own = {"model", "dataset", "demonstration_dataset", "chat_template_kwargs"}  # set by the command, or nothing
    assert ("(default: " in text) == (field.default is None and name not in own)


def test_help_of_the_other_commands_shows_defaults(shown):
    text = " ".join(shown("eval", "--help").split())
    for default in ("runs/builtin", "builtin", "all", "0.2", "0.0", "1", "float32", "auto"):
        assert f"(default: {default})" in text
    assert "(default: runs/comparison)" in " ".join(shown("compare", "--help").split())
    assert "(default: 24 for a GPU;" in " ".join(shown("plan", "--help").split())


def test_a_percent_sign_in_a_text_stays(capsys):
    parser = Parser(prog="toolx")
    parser.flag("share", help="95 % of it, %(default)s", default=3)
    parser.print_help()
    assert "95 % of it, %(default)s (default: 3)" in capsys.readouterr().out


def test_the_version(shown):
    assert shown("--version").split() == [
        *("toolx_kernels", version_of("toolx_kernels") + ","),
        *("torch", version_of("torch") + ","),
        *("transformers", version_of("transformers")),
    ]
    assert version_of("no-such-package") == "absent"


MISSPELT = [
    ("trian", "toolx: unknown command 'trian': did you mean train?"),
    ("fly", "toolx: unknown command 'fly': use one of train, eval, compare, plan, doctor."),
    ("--fly", "toolx: unknown flag --fly: see toolx --help."),
    ("--verson", "toolx: unknown flag --verson: did you mean --version?"),
    ("train --learning-rat 3", "toolx train: unknown flag --learning_rat: did you mean --learning_rate?"),
    ("train --learning-rat=3", "toolx train: unknown flag --learning_rat: did you mean --learning_rate?"),
    ("plan --memry 3", "toolx plan: unknown flag --memry: did you mean --memory?"),
    ("eval --modl tiny", "toolx eval: unknown flag --modl: did you mean --model?"),
    ("doctor --fly", "toolx doctor: unknown flag --fly: see toolx doctor --help."),
    ("train rows.jsonl", "toolx train: 'rows.jsonl' follows no flag; see toolx train --help."),
    ("train --help rolout", "toolx train: there is no group 'rolout': did you mean rollout?"),
    ("train --help x", "toolx train: there is no group 'x': choose one of run, data, chat, rollout, hard-sampling, "),
    ("train --config replce", "toolx train: --config replce: there is no such file or recipe: did you mean replace?"),
    ("train --config zzz", "toolx train: --config zzz: there is no such file or recipe: the recipes are add, builtin"),
    ("train --hard_sampling retyr", "toolx train: hard_sampling='retyr' is unknown: did you mean retry?"),
    (
        "train --hard_sampling x",
        "toolx train: hard_sampling='x' is unknown: choose one of replace, add, distill,",
    ),
    ("eval --split heldout", "toolx eval: unknown --split 'heldout': did you mean held-out?"),
    ("eval --dtype half", "toolx eval: unknown --dtype 'half': use one of float32, bfloat16."),
    ("train --learning_rate fast", "toolx train: --learning_rate: 'fast' is not a number; see toolx train --help."),
    ("train --max_steps 2.5", "toolx train: --max_steps: '2.5' is not a whole number; see toolx train --help."),
    ("train --resume maybe", "toolx train: --resume: 'maybe' is neither true nor false; see toolx train --help."),
    ("compare", "toolx compare: the following arguments are required: RUN; see toolx compare --help."),
]


@pytest.mark.parametrize("typed, said", MISSPELT, ids=[typed for typed, _ in MISSPELT])
def test_misspelt_words(typed, said, capsys):
    assert main(typed.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(said) and err.count("\n") == 1
