"""User functions that hold the interpreter in this process: the process ends, whichever function it is and when."""

import subprocess
import sys

import pytest

KINDS = ("plain", "later", "abandoned", "environment")
PROGRAM = """\
import ctypes, os, re, sys, time
from toolx_kernels.toolcall import RewardFunctions, Row, background
from toolx_kernels.toolcall.tools import Toolbox

background.GRACE_S = 0.9

def hold():
    re.match(r"(a+)+$", "a" * 40 + "b")  # GUILTY

def plain(prompts, **columns):
    hold()

async def later(prompts, **columns):
    hold()

def abandoned(prompts, **columns):
    time.sleep(0.4)
    hold()

def spins(prompts, **columns):  # Python code lets other threads run
    while True:
        pass

class Environment:
    def __init__(self):
        ctypes.PyDLL(None).sleep(60)  # GUILTY

    def reset(self):
        pass

class Written:
    text, ids, messages = "x", [1], []

def work(kind):
    if kind == "environment":
        Toolbox(environment_factory=Environment, timeout=0.2)
    try:
        RewardFunctions(globals()[kind], timeout=0.2)([Row("r", "p", [], [])], [Written()])
    except ValueError as error:
        print(error, flush=True)
    if kind == "spins":
        time.sleep(1.4)
        os._exit(0)
    time.sleep(60)  # when nobody waits for the function

forks = {}
for kind in sys.argv[1:]:
    if pid := os.fork():
        forks[kind] = pid
    else:
        os.dup2(os.open(kind, os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        work(kind)
for kind, pid in forks.items():
    print(kind, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each kind of function wrote before the process ended."""
    folder = tmp_path_factory.mktemp("watchdog")
    (folder / "program.py").write_text(PROGRAM)
    command = [sys.executable, "program.py", *KINDS, "spins"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=50)
    assert done.stdout.splitlines() == [*(f"{kind} 1" for kind in KINDS), "spins 0"]
    return {kind: (folder / kind).read_text() for kind in (*KINDS, "spins")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_function_that_holds_the_interpreter_ends_the_process_and_is_shown(said, kind):
    guilty = [number for number, line in enumerate(PROGRAM.splitlines(), 1) if "GUILTY" in line]
    before, _, stacks = said[kind].partition("Timeout (0:00:01.100000)!\n")
    assert ("'abandoned' did not return within 0.2 s" in before) == (kind == "abandoned")
    assert f'program.py", line {guilty[kind == "environment"]} in ' in stacks and "Traceback" not in stacks


def test_a_function_that_lets_others_run_is_given_up_and_nothing_more(said):
    assert "'spins' did not return within 0.2 s" in said["spins"] and said["spins"].count("\n") == 1
