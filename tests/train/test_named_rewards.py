"""Reward functions by name: how they are found, and one sentence for names that do not work."""

import pickle
import sys

import pytest

from tests.train.scripted import scripted_trainer
from tests.train.test_trainer import SMALL, even_is_good, metrics, training_rows
from toolx_kernels.errors import InputError
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.named_rewards import named_rewards
from toolx_kernels.train.trainer import ToolExpanderTrainer

FUNCTION = "def short(prompts, completions, completion_ids, **columns):\n    return [0.0 for _ in prompts]\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory; modules imported in the test are dropped afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_functions_of_a_file_and_of_a_module_in_the_working_directory(here):
    (here / "inner").mkdir()
    (here / "inner" / "own_rewards.py").write_text(f"import sibling_of_own\nrun = sibling_of_own.count()\n{FUNCTION}")
    (here / "inner" / "sibling_of_own.py").write_text("from itertools import count\ncount = count().__next__\n")
    (here / "own_module.py").write_text(FUNCTION.replace("short", "long"))
    short, long, again = named_rewards(["inner/own_rewards.py:short", "own_module.long", "inner/own_rewards.py:short"])
    assert (short.__name__, long.__name__) == ("short", "long") and again is short
    assert short.__globals__["run"] == 0, "a file is run once"
    assert sys.path.index(str(here)) > 0, "behind what is installed"


def test_a_file_hides_no_module_of_its_name(here):
    (here / "json.py").write_text(FUNCTION)
    (short,) = named_rewards(["json.py:short"])
    import json

    assert json.dumps(short.__name__) == '"short"'


def test_what_a_file_defines_can_be_pickled(here):
    """As ``multiprocessing`` needs."""
    (here / "own.rewards.py").write_text(FUNCTION)
    (short,) = named_rewards(["own.rewards.py:short"])
    assert pickle.loads(pickle.dumps(short)) is short


FAULTS = [
    ("__main__.f", "reward_funcs=__main__.f is in the program that runs, which is not imported again: pass the func"),
    ("short", "reward_funcs=short names no module: write module.function or path/to/file.py:function."),
    ("missing.py:f", "there is no Python file missing.py: write module.function or path/to/file.py:function."),
    ("notes.txt:f", "there is no Python file notes.txt: write"),
    ("missing_module.f", "there is no module 'missing_module': write"),
    ("own_faulty.inner.f", "file.py:function; modules are those that are installed and those in /"),
    ("own_faulty.py:shrt", "reward_funcs=own_faulty.py:shrt: own_faulty.py has no 'shrt': did you mean short?"),
    ("own_faulty.shrt", "reward_funcs=own_faulty.shrt: own_faulty has no 'shrt': did you mean short?"),
    ("own_faulty.py:x", "own_faulty.py has no 'x': write module.function"),
    (
        "own_faulty.py:WORDS",
        "reward_funcs=own_faulty.py:WORDS is of type list: name a function of prompts, completions",
    ),
    ("own_faulty.py:Reward", "reward_funcs=own_faulty.py:Reward is a class: name a function"),
    ("raises.py:f", "raises.py, line 2, raised ModuleNotFoundError (No module named 'nowhere'): repair that first."),
    ("raises.f", "raises.py, line 2, raised ModuleNotFoundError (No module named 'nowhere'): repair that first."),
    ("leaves.py:f", "leaves.py, line 4, raised SystemExit (with words): repair that first."),
    ("..f", "reward_funcs=..f names no module: write"),
    ("own\0.py:f", "names no module: write"),
    ("zeros.py:f", "reward_funcs=zeros.py:f: its "),  # text or import, in words of the version of Python
    (
        "relative.py:f",
        "relative.py, line 1, raised ImportError (attempted relative import with no known parent package): name the "
        "function as package.module.function, as a file belongs to no package.",
    ),
    ("unreadable.py:f", "unreadable.py, line 2, raised SyntaxError (invalid syntax): repair that first."),
]


@pytest.mark.parametrize("name, said", FAULTS, ids=[name for name, _ in FAULTS])
def test_faults_are_told_in_one_sentence(here, name, said):
    (here / "notes.txt").write_text("f")
    (here / "own_faulty.py").write_text(f"WORDS = []\nclass Reward: pass\n{FUNCTION}")
    (here / "zeros.py").write_bytes(bytes(3))
    (here / "relative.py").write_text("from . import own_faulty\n")
    (here / "raises.py").write_text("# comment\nimport nowhere\n")
    (here / "leaves.py").write_text("import sys\ndef f():\n    sys.exit('with words\\nand more')\nf()\n")
    (here / "unreadable.py").write_text("f = 1\ndef f(:\n")
    for _ in range(2):  # a file that failed is run again
        with pytest.raises(InputError) as error:
            named_rewards([name])
        assert said in str(error.value) and "\n" not in str(error.value)


def test_the_trainer_takes_functions_or_names(here):
    (here / "own_rewards.py").write_text(FUNCTION)
    (here / "own_faulty.py").write_text("1 / 0")
    names = ["own_rewards.py:short"]

    def trainer(reward_funcs, names, model="tiny"):
        args = ToolExpanderConfig(output_dir="run", reward_funcs=names, **SMALL)
        return ToolExpanderTrainer(model, reward_funcs, args, training_rows(4), training_rows(4))

    assert trainer(None, names).task.rewards.names == ["short"]
    with pytest.raises(
        InputError, match="args.reward_funcs=.*own_rewards.py:short.* names reward functions too: choose"
    ):
        trainer(even_is_good, names)
    with pytest.raises(InputError, match="own_faulty.py, line 1, raised ZeroDivisionError"):
        trainer(None, ["own_faulty.py:f"], "missing")  # before the model is loaded
    with pytest.raises(InputError, match="reward=similarity is a default reward, which reward_funcs replaces"):
        ToolExpanderConfig(reward="similarity", reward_funcs=names)


def test_evaluations_tell_the_mean_reward_of_own_functions(finished, tmp_path):
    """Which get at most as many completions at a time as in a step; the default reward is not called."""
    sizes = []

    def length(completion_ids, **columns):
        sizes.append(len(completion_ids))
        return [float(len(ids)) for ids in completion_ids]

    small = dict(prompts_per_step=1, num_generations=2)
    trainer = scripted_trainer(tmp_path / "own", lambda *_: False, length, **small)
    trainer.task.eval_rows *= 3
    scores = trainer.evaluate()
    assert sizes == [2, 2, 2] and scores.reward == sum(answer.tokens for (answer,) in scores.answers) / 6
    assert scripted_trainer(tmp_path / "default", lambda *_: False, **small).evaluate().reward is None

    folder, summary = finished
    first, *_, last = metrics(folder, ["eval"])
    assert 0 < first["reward"] == summary["eval_reward_before"] and last["reward"] == summary["eval_reward_after"]
    assert first["step"] == 0 and last["step"] == 6
