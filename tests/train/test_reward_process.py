"""The process of named reward functions: it keeps its state, ends with its parent, and whatever happens is said."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall import Row
from toolx_kernels.train import reward_process
from toolx_kernels.train.reward_process import RewardProcess

FUNCTIONS = '''
import asyncio, ctypes, os, re, signal, subprocess, sys, time
from itertools import count

count = count(1).__next__
seen = {}

def counts(prompts, completions, completion_ids, **columns):
    return [count()] * len(prompts)

def process(prompts, **columns):
    return [os.getpid()] * len(prompts)

def checks(prompts, completions, completion_ids, expected, **columns):
    given = dict(columns, prompts=prompts, completions=completions, completion_ids=completion_ids)
    assert given == expected[0], given
    completions[0][0]["content"] = ""
    return [None, 0.5]

async def later(prompts, **columns):
    await asyncio.sleep(0)
    return [0.25] * len(prompts)

def children(prompts, **columns):
    """Ends a program and a fork as anyone does."""
    program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    program.terminate()
    if not (fork := os.fork()):
        signal.pause()
    time.sleep(0.05)
    os.kill(fork, signal.SIGTERM)
    return [program.wait(), -os.waitpid(fork, 0)[1]]

def regex(prompts, **columns):
    print("regex in", os.getpid())
    re.match(r"(a+)+$", "a" * 40 + "b")

async def c_call(prompts, **columns):
    await asyncio.sleep(0.1)
    ctypes.PyDLL(None).sleep(60)

def slow(prompts, **columns):
    time.sleep(60)

def exits(prompts, **columns):
    os._exit(3)

def stops(prompts, **columns):
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)
'''


@dataclass
class Written:
    text: str = "x"
    ids: tuple = (1, 2)
    messages: list = field(default_factory=lambda: [{"role": "assistant", "content": "x"}])


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "own.py").write_text(FUNCTIONS)
    (folder / "exits.py").write_text("import os\nos._exit(4)\n")
    (folder / "json.py").write_text("import os\nos._exit(5)  # this file hides no installed module")
    before = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def process(here):
    names = ("counts", "process", "later")
    return RewardProcess([f"own.{name}" for name in names], [1.0, 0.0, 2.0], 30.0)


ROWS = [Row("r", "p", [], [], {"level": 1}), Row("s", "q", [], [])]
WRITTEN = [Written(), Written()]


def pid_of(process):
    return int(process(ROWS, WRITTEN).parts["process"][0])


def test_a_process_that_is_started_again_finds_its_file(here, tmp_path, monkeypatch):
    process = RewardProcess(["own.py:process"], None, 30.0)
    first = pid_of(process)
    process._process.kill()
    process._process.wait()
    with pytest.raises(InputError, match="ended its process, which was ended by SIGKILL"):
        process(ROWS, WRITTEN)
    monkeypatch.chdir(tmp_path)
    assert pid_of(process) != first


def test_names_weights_and_state_are_those_of_functions_in_one_place(process):
    assert process.names == ["counts", "process", "later"]
    first, second = (process(ROWS, WRITTEN) for _ in range(2))
    assert first.parts["counts"] == [1.0, 1.0] and second.parts["counts"] == [2.0, 2.0]
    assert first.parts["later"] == [0.25, 0.25] and first.total == [1.5, 1.5] and first.unrewarded == 0
    assert second.parts["process"] == first.parts["process"] != [os.getpid()] * 2
    assert "own" not in sys.modules


def test_functions_get_copies_of_everything_and_may_start_and_end_programs(here):
    chat = [{"role": "user", "content": "p"}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    calls = [{"name": "f", "arguments": {"a": 1}}]
    expected = {
        "prompts": [chat, "q"],
        "completions": [[{"role": "assistant", "content": "x"}], "x"],
        "completion_ids": [[1, 2], [1, 2]],
        "id": ["r", "s"],
        "tools": [tools, []],
        "answer": [calls, []],
        "extra": [(1, {2}), None],
    }
    rows = [Row("r", chat, tools, calls, {"extra": (1, {2}), "expected": expected}), ROWS[1]]
    rewards = RewardProcess(["own.checks", "own.children"], None, 30.0)
    assert rewards(rows, WRITTEN).parts == {"checks": [None, 0.5], "children": [-signal.SIGTERM] * 2}
    assert WRITTEN == [Written(), Written()]
    expected["id"] = []
    with pytest.raises(InputError, match="'checks' raised AssertionError: .* for 2 completions") as error:
        rewards(rows, WRITTEN)
    assert 'own.py", line ' in str(error.value.__cause__), "its traceback"


class Mine:
    """A class that the other process cannot import."""


Mine.__module__ = "__main__"


@pytest.mark.parametrize(
    "value, said", [(threading.Lock(), "TypeError: cannot pickle"), (Mine, "PicklingError: "), (pytest, "TypeError")]
)
def test_a_column_that_cannot_be_sent_is_named(process, value, said):
    before = pid_of(process)
    with pytest.raises(
        InputError, match="the column 'level' cannot be sent to the process of the reward .*: give"
    ) as e:
        process([Row("r", "p", [], [], {"level": value})], [Written()])
    assert said in str(e.value) and pid_of(process) == before


def test_a_column_of_a_class_that_only_this_process_has(process, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "Mine", Mine, raising=False)
    with pytest.raises(InputError, match="the column 'level' cannot be sent .*AttributeError.* attribute 'Mine'"):
        process([Row("r", "p", [], [], {"level": Mine()})], [Written()])


def test_signals_to_the_group_are_left_to_the_parent(process):
    before = pid_of(process)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(before, number)
    assert pid_of(process) == before


HELD = (
    "did not return within 0.6 s for 2 completions, the first of row 'r' and held Python's interpreter, as an endless"
)
DEATHS = {
    "regex": f"reward function 'regex' {HELD}",
    "c_call, slow": f"one of the reward functions slow, c_call {HELD}",
    "exits": "reward function 'exits' ended its process, which ended with exit code 3, for 2 completions, the first of",
    "stops": f"reward function 'stops' {HELD}",
}


@pytest.fixture(scope="module")
def said(here):
    """What is said of each death; all at the same time, because most of it is waiting."""

    def die(names):
        rewards = RewardProcess([f"own.{name}" for name in names.split(", ")], None, 0.6)
        with pytest.raises(InputError) as error:
            rewards(ROWS, WRITTEN)
        return str(error.value)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor() as pool:
        patch.setattr(reward_process, "GRACE_S", 0.4)
        patch.setattr(reward_process, "POLL_S", 0.1)
        return dict(zip(DEATHS, pool.map(die, DEATHS), strict=True))


@pytest.mark.parametrize("names", DEATHS)
def test_a_process_that_hangs_or_dies_is_told_with_its_function(said, names):
    assert DEATHS[names] in said[names]


def test_the_next_call_after_a_death_starts_it_anew(process):
    os.kill(pid_of(process), signal.SIGKILL)
    with pytest.raises(InputError, match="functions counts, process, later ended its process, .* SIGKILL .out of"):
        process(ROWS, WRITTEN)
    assert process(ROWS, WRITTEN).parts["counts"] == [1.0, 1.0]


def test_an_interrupt_during_a_hang_ends_both_at_once():
    """The first signal is only noted, as in a step."""
    rewards, noted = RewardProcess(["own.regex"], None, 50.0), []

    def handle(number, frame):
        noted.append(time.monotonic())
        if len(noted) == 2:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            rewards(ROWS, WRITTEN)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - noted[1] < 10 and rewards._process.returncode == -signal.SIGKILL


def test_it_ends_with_its_parent_even_while_it_hangs(here):
    code = (
        "from toolx_kernels.train.reward_process import RewardProcess; from toolx_kernels.toolcall import Row\n"
        "class W: text, ids, messages = 'x', [1], []\n"
        f"RewardProcess(['{here / 'own.py'}:regex'], None, 500.0)([Row('r', 'p', [], [])], [W()])"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=here.parent, stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline().startswith("regex in ")
    parent.kill()
    assert parent.stdout.read() == ""  # until all who could write to it are gone


FAULTS = [
    (["exits.f"], None, "reward_funcs=exits.f: the process that imported them ended with exit code 4: repair that"),
    (["own.later", "own.slow"], [1.0], "reward_weights has 1 entries for 2 reward functions"),
]


@pytest.mark.parametrize("names, weights, said", FAULTS, ids=[said for *_, said in FAULTS])
def test_faults_of_names_come_at_the_start(names, weights, said):
    with pytest.raises(InputError) as error:
        RewardProcess(names, weights, 1.0)
    assert said in str(error.value)
