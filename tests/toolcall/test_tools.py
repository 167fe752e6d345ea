"""Tools made of functions and environments: schemas, results of calls, time limits, state."""

import asyncio
import json
import threading
import time
from concurrent.futures import wait
from functools import partial

import pytest

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall import background
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.toolcall.tools import MAX_THREADS, Toolbox, tool_schema

ROW = Row("r", "Go.", [], [], {"start": 3, "secret": [1, 2]})


def add(a: int, b: int = 1) -> int:
    """Add two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


def weather(city: str) -> str:
    """Weather of a city.

    Args:
        city: Its name.
    """
    return f"sunny in {city}"


def fail(kind: str) -> str:
    """Fails in several ways.

    Args:
        kind: How.
    """
    if kind == "exit":
        raise SystemExit(3)
    if kind == "circle":
        circle = []
        circle.append(circle)
        return circle
    if kind == "own timeout":
        raise TimeoutError("the server said so")
    raise ValueError("first line\nsecond line")


slept = []


def pause(seconds: float) -> str:
    """Sleeps.

    Args:
        seconds: How long.
    """
    time.sleep(seconds)
    slept.append(seconds)
    return f"slept {seconds}"


async def pause_async(seconds: float) -> str:
    """Sleeps without a thread.

    Args:
        seconds: How long.
    """
    await asyncio.sleep(seconds)
    return f"awaited {seconds}"


class Counter:
    """Counts from the row's ``start``."""

    def reset(self, start):
        self.value, self.inside, self.gate = start, 0, threading.Event()

    def up(self, by: int) -> int:
        """Count up.

        Args:
            by: How far.
        """
        self.inside += 1
        time.sleep(0.02)
        assert self.inside == 1, "two methods at the same time"
        self.inside -= 1
        self.value += by
        return self.value

    def stick(self) -> str:
        """Waits for the gate, and then counts up by 100."""
        self.gate.wait(10)
        self.value += 100
        return "done"

    def _hidden(self) -> None:
        pass


def call(name, **arguments):
    return {"name": name, "arguments": arguments}


def answers(toolbox, *calls, row=ROW):
    (session,) = toolbox.open([row])
    return toolbox.answer([(session, list(calls))])[0]


def test_schemas_are_those_of_transformers_and_stand_behind_the_rows_own():
    own = {"type": "function", "function": {"name": "add", "description": "Mine.", "parameters": {"type": "object"}}}
    toolbox = Toolbox([add, weather], Counter, timeout=1)
    (row,) = toolbox.offer([Row("r", "Go.", [own], [], {"start": 1})])
    assert row.tool_names == ["add", "weather", "stick", "up"]
    assert row.tools[0] is own
    function = row.tools[1]["function"]
    assert function["description"] == "Weather of a city."
    assert function["parameters"] == {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "Its name."}},
        "required": ["city"],
    }
    assert tool_schema(add)["function"]["parameters"]["required"] == ["a"]
    assert answers(toolbox, call("add", a=1, b=4), row=row) == ["5"], "the function answers for the row's own schema"


def test_results_are_strings_as_they_are_and_json():
    def give(what: str) -> object:
        """Gives a value.

        Args:
            what: Which.
        """
        return {"text": "as it is: ü", "none": None, "object": {"ü": [1, True]}, "set": {4}, "half": "\ud800!"}[what]

    give.__annotations__["return"] = str
    toolbox = Toolbox([give, add], timeout=5)
    names = ("text", "none", "object", "set", "half")
    assert answers(toolbox, *(call("give", what=name) for name in names)) == [
        "as it is: ü", "null", '{"ü": [1, true]}', '"{4}"', "?!",
    ]  # fmt: skip
    assert answers(toolbox, call("add", a=2), call("add", a=1, b=1)) == ["3", "2"]


def test_errors_come_back_as_text():
    offered = {"type": "function", "function": {"name": "ghost", "parameters": {"type": "object"}}}
    texts = answers(
        Toolbox([add, fail], timeout=5),
        call("add", a="one"),
        call("add"),
        call("add", a=1, c=2),
        call("missing"),
        call("ghost"),
        call("fail", kind="value"),
        call("fail", kind="exit"),
        call("fail", kind="circle"),
        call("fail", kind="own timeout"),
        call("add", a=1),
        row=Row("r", "Go.", [offered], []),
    )
    errors = [json.loads(text)["error"] for text in texts[:-1]]
    assert errors[0].startswith("TypeError: can only concatenate str")
    assert errors[1:5] == [
        "add: missing a required argument: 'a'",
        "add: got an unexpected keyword argument 'c'",
        "there is no tool missing",
        "ghost cannot be run here",
    ]
    assert errors[5:7] == ["ValueError: first line", "SystemExit: 3"]
    assert errors[7].startswith("ValueError: Circular")
    assert errors[8] == "TimeoutError: the server said so"
    assert texts[-1] == "2"
    assert not any("\n" in text for text in texts)


def test_calls_of_a_turn_and_of_all_episodes_run_in_parallel():
    barrier = threading.Barrier(6)

    def meet(n: int) -> int:
        """Waits for all others.

        Args:
            n: Comes back.
        """
        barrier.wait(10)
        return n

    async def meet_async(n: int) -> int:
        """Waits for all others.

        Args:
            n: Comes back.
        """
        await asyncio.to_thread(barrier.wait, 10)
        return n

    toolbox = Toolbox([meet, meet_async], timeout=10)
    sessions = toolbox.open([ROW, ROW])
    calls = [call("meet", n=1), call("meet_async", n=2), call("meet", n=3)]
    assert toolbox.answer([(session, calls) for session in sessions]) == [["1", "2", "3"]] * 2


def test_more_calls_than_threads():
    toolbox = Toolbox([add], timeout=10)
    sessions = toolbox.open([ROW] * 3)
    calls = [call("add", a=i) for i in range(MAX_THREADS // 2)]
    assert toolbox.answer([(session, calls) for session in sessions]) == [[str(i + 1) for i in range(64)]] * 3


@pytest.mark.parametrize("name", ["pause", "pause_async"])
def test_a_call_may_take_no_longer_than_the_timeout(name):
    toolbox = Toolbox([pause, pause_async, add], timeout=0.5)
    texts = answers(toolbox, call(name, seconds=60), call(name, seconds=0.01), call(name, seconds=60), call("add", a=1))
    assert 60 not in slept
    assert json.loads(texts[0]) == json.loads(texts[2]) == {"error": "TimeoutError: no answer within 0.5 s"}
    assert texts[1].endswith("0.01") and texts[3] == "2"


def test_a_late_async_call_is_cancelled():
    seen = []

    async def wait(seconds: float) -> str:
        """Waits.

        Args:
            seconds: How long.
        """
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    answers(Toolbox([wait], timeout=0.1), call("wait", seconds=5))
    deadline = time.monotonic() + 10
    while not seen and time.monotonic() < deadline:
        time.sleep(0.01)
    assert seen == ["cancelled"]


def test_async_calls_share_one_loop():
    loops = []

    async def where() -> str:
        """Says nothing."""
        loops.append(asyncio.get_running_loop())
        return ""

    toolbox = Toolbox([where], timeout=5)
    answers(toolbox, call("where"), call("where"))
    answers(toolbox, call("where"))
    assert len(loops) == 3 and len(set(map(id, loops))) == 1


def test_threads_of_calls_do_not_keep_the_process_alive():
    before = set(threading.enumerate())  # other tests leave threads behind
    answers(Toolbox([pause], timeout=0.05), call("pause", seconds=1))
    started = set(threading.enumerate()) - before
    assert started and all(thread.daemon for thread in started)


# ---- environments


def test_an_environment_keeps_the_state_of_its_episode_in_the_order_of_calls():
    toolbox = Toolbox([add], Counter, timeout=5)
    sessions = toolbox.open([ROW, Row("s", "Go.", [], [], {"start": 50})])
    up = [call("up", by=1), call("add", a=1), call("up", by=10), call("up", by=100)]
    assert toolbox.answer([(session, up) for session in sessions]) == [
        ["4", "2", "14", "114"],
        ["51", "2", "61", "161"],
    ]
    assert toolbox.answer([(sessions[0], [call("up", by=1)])]) == [["115"]]


def test_methods_behind_one_that_is_too_slow_do_not_run_and_later_ones_wait_for_it():
    toolbox = Toolbox(environment_factory=Counter, timeout=0.5)
    (session,) = toolbox.open([ROW])
    late = {"error": "TimeoutError: no answer within 0.5 s"}
    texts = toolbox.answer([(session, [call("up", by=1), call("stick"), call("up", by=5)])])[0]
    assert texts[0] == "4"
    assert json.loads(texts[1]) == late
    assert json.loads(texts[2]) == {"error": "not run, as the call before it took too long"}
    assert json.loads(toolbox.answer([(session, [call("up", by=7)])])[0][0]) == late
    session.functions["up"].__self__.gate.set()
    assert toolbox.answer([(session, [call("up", by=1)])]) == [["105"]], "and what was given up never ran"


def test_slow_environments_are_waited_for_together(monkeypatch):
    waited = []

    def watched(futures, seconds):
        done = wait(futures, seconds)
        waited.append(seconds if done.not_done else 0)
        return done

    monkeypatch.setattr(background, "wait", watched)
    toolbox = Toolbox(environment_factory=Counter, timeout=0.5)
    sessions = toolbox.open([ROW] * 8)
    results = toolbox.answer([(session, [call("up", by=1), call("stick")]) for session in sessions])
    assert 0 < sum(waited) < 2  # one after the other would take 4
    assert [texts[0] for texts in results] == ["4"] * 8


class Everything(Counter):
    def reset(self, **fields):
        self.fields = fields
        fields["secret"].append("mine")
        return f" Secret of {len(fields['secret'])}."


def test_reset_gets_the_row_and_its_text_ends_the_prompt():
    toolbox = Toolbox(environment_factory=Everything, timeout=5)
    rows = [
        ROW,
        Row("m", [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}], [], [], {"secret": []}),
    ]
    offered = toolbox.offer(rows)
    assert offered[0].prompt == "Go. Secret of 3."
    assert offered[1].prompt == [{"role": "user", "content": "A Secret of 1."}, {"role": "assistant", "content": "B"}]
    sessions = toolbox.open(offered)
    environment = sessions[0].functions["up"].__self__
    assert environment.fields == {"id": "r", "answer": [], "start": 3, "secret": [1, 2, "mine"]}
    assert ROW.columns["secret"] == [1, 2], "an environment gets copies"
    assert environment is not toolbox.open(offered)[0].functions["up"].__self__, "fresh for every episode"


def test_a_text_that_changes_from_episode_to_episode_is_refused():
    texts = iter(["one", "two"])

    class Moody(Counter):
        def reset(self):
            return next(texts)

    toolbox = Toolbox(environment_factory=Moody, timeout=5)
    offered = toolbox.offer([ROW])
    with pytest.raises(InputError, match="returned 'two' for row 'r'"):
        toolbox.open(offered)


@pytest.mark.parametrize(
    "reset, message",
    [
        (lambda self, absent: None, r"row 'r' \(TypeError: .*missing 1 required positional argument: 'absent'\)"),
        (lambda self: 7, "TypeError: reset returned 7, neither a string nor None"),
        (lambda self: time.sleep(0.5), "TimeoutError: no answer within 0.1 s"),
    ],
)
def test_a_reset_that_fails_names_the_row(reset, message):
    broken = type("Broken", (Counter,), {"reset": reset})
    toolbox = Toolbox(environment_factory=broken, timeout=0.1)
    for begin in (toolbox.offer, toolbox.open):
        with pytest.raises(InputError, match=message):
            begin([ROW])


# ---- refused tools


def bare(x):
    """No hint."""


def undescribed(x: int) -> int:
    """No line for x."""


class NoReset:
    def up(self) -> int:
        """Up."""


class Judge(Counter):
    def get_reward(self):
        return 1.0


class Adder(Counter):
    def add(self, a: int) -> int:
        """Add.

        Args:
            a: A number.
        """


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "neither tools nor an environment_factory"),
        ({"tools": add}, "put it in brackets"),
        ({"tools": [partial(add, b=2)]}, "tools holds functools.partial.*made with def"),
        ({"tools": [add, add]}, "Two tools are called 'add'"),
        ({"tools": [add], "environment_factory": Adder}, "Two tools are called 'add'"),
        ({"tools": [bare]}, "tool 'bare'.*missing a type hint"),
        ({"tools": [undescribed]}, "tool 'undescribed'.*no description for the argument 'x'"),
        ({"environment_factory": NoReset}, "NoReset has no method reset"),
        ({"environment_factory": Judge}, "get_reward of Judge would never be called"),
        ({"tools": [add], "timeout": 0}, "timeout=0 of a tool call must be positive"),
        ({"tools": [add], "timeout": float("inf")}, "timeout=inf"),
    ],
)
def test_what_cannot_be_a_tool_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Toolbox(**({"timeout": 1} | arguments))


def test_an_async_tool_that_exits_does_not_end_the_next_call():
    async def leave() -> str:
        """Leaves."""
        raise SystemExit(2)

    first, second = answers(Toolbox([leave, pause_async], timeout=5), call("leave"), call("pause_async", seconds=0))
    assert "SystemExit: 2" in first and "error" not in second


def test_an_environment_factory_that_fails_is_named():
    with pytest.raises(InputError, match=r"environment_factory raised SystemExit \(no server\): fix it"):
        Toolbox((), partial(exec, "raise SystemExit('no server')"), timeout=1.0)

    def no_server():
        raise RuntimeError("no server")

    with pytest.raises(InputError, match=r"environment_factory raised RuntimeError \(no server\): fix it"):
        Toolbox((), no_server, timeout=1.0)
