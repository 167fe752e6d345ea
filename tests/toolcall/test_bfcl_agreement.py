"""Agreement of our matcher with bfcl-eval's own checker on every ground truth and on answers with one change."""

import copy
import importlib.util
import itertools
import json
import random
import sys
import types
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from toolx_kernels.toolcall import CATEGORIES, bfcl_match, read_bfcl

LANGUAGES = {"simple_java": "java", "simple_javascript": "javascript"}
# At most this many changes of each kind per row, drawn with its id as seed.
PER_KIND = {"type": 12, "missing": 4, "extra": 4, "value": 20, "order": 4, "calls": 4}
LEAST = 20_000


@pytest.fixture(scope="module")
def checker():
    """bfcl-eval's ``ast_checker``, with a stub for the model table, which would import every model's client."""
    pytest.importorskip("bfcl_eval")
    stub = types.ModuleType("bfcl_eval.constants.model_config")
    stub.MODEL_CONFIG_MAPPING = {"stub": types.SimpleNamespace(underscore_to_dot=False)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, stub.__name__, stub)
        from bfcl_eval.constants.enums import Language
        from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker

        def check(calls, functions, possible, category):
            language = Language(LANGUAGES.get(category, "python"))
            output = [{call["name"]: copy.deepcopy(call["arguments"])} for call in calls]
            try:
                return ast_checker(functions, output, possible, language, category, "stub")["valid"]
            except (TypeError, AttributeError, ValueError, OverflowError):
                return False  # it crashes on some model outputs

        yield check


def raw_functions(category):
    folder = Path(importlib.util.find_spec("bfcl_eval").submodule_search_locations[0], "data")
    lines = (folder / f"BFCL_v4_{category}.json").read_text(encoding="utf-8").splitlines()
    return {raw["id"]: raw["function"] for raw in map(json.loads, lines)}


def other_types(value):
    """Values of other types than ``value``; the rules still accept some of them."""
    others = (None, True, 0, 1.5, "", "x", [], {}, [value], {"a": value}, str(value), json.dumps(value))
    yield from (other for other in others if type(other) is not type(value))
    if type(value) is int:
        yield float(value)
    elif isinstance(value, float):
        yield int(value)
    elif isinstance(value, str):
        yield from (read(value) for read in (int, float, json.loads) if reads(read, value))
    yield from inside(value, other_types)


def other_values(value):
    """Values of the type of ``value``: nearly right, right but spelled differently, or wrong."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield from (value + 1, -value, 0, value * 10**30)
    elif isinstance(value, str):
        yield from ("", value.upper(), value.swapcase(), f" {value.replace(' ', '-')}.", value + "s", value[:-1])
        yield from (value.replace("'", '"'), f"'{value}'", f'"{value}"', value + "\n", value.replace(", ", ","))
        yield from java_and_javascript(value)
    elif isinstance(value, list):
        yield from (value[::-1], value[1:], [*value, *value[:1]], [*value, None], [*value, "x"], [])
    elif isinstance(value, dict):
        yield from (dict(reversed(value.items())), {**value, "unheard_of": 1}, {})
        yield from ({k: v for k, v in value.items() if k != key} for key in value)
    yield from inside(value, other_values)


def java_and_javascript(value):
    """Literals in another spelling, some no longer valid."""
    yield from (value.replace("{{ ", "{ { ").replace("}}", "} }"), f"new Array({value.strip('[]')})")
    yield from (value.replace("Arrays.asList(", "").replace("))", ")"), "[" + value + "]", value + "L", value + "n")
    inner = value.partition("asList(")[2].removesuffix("))")
    adds = " ".join(f"add({item});" for item in inner.split(", "))
    yield from (f"new ArrayList<Object>() {{{{ {adds} }}}}", f"new ArrayList<>() {{{{{adds}}}}}")


def inside(value, change):
    if isinstance(value, list):
        for n, item in enumerate(value):
            yield from ([*value[:n], other, *value[n + 1 :]] for other in change(item))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from ({**value, key: other} for other in change(item))


def reads(read, text):
    try:
        read(text)
    except ValueError:
        return False
    return True


def changed_answers(row):
    """Returns kind of change -> answers of ``row`` with one such change."""
    calls, tools = row.answer, {tool["function"]["name"]: tool["function"] for tool in row.tools}
    changed = defaultdict(list)
    changed["order"] += map(list, itertools.islice(itertools.permutations(calls), 1, 7))
    changed["calls"] += [calls[1:], [*calls, *calls[:1]], []]
    for n, (call, expected) in enumerate(zip(calls, row.columns["possible_answers"], strict=True)):
        name, arguments = call["name"], call["arguments"]

        def put(kind, arguments, name=name, n=n):
            changed[kind].append([*calls[:n], {"name": name, "arguments": arguments}, *calls[n + 1 :]])

        for other in (name.upper(), name.replace(".", "_"), f"{name}_", *tools):
            if other != name:
                put("calls", arguments, other)
        put("missing", {})
        put("extra", {**arguments, "unheard_of": 1})
        put("order", dict(reversed(arguments.items())))
        put("order", dict(zip(arguments, [*arguments.values()][::-1], strict=True)))
        put("order", calls[n - 1]["arguments"])
        for key in tools[name]["parameters"].get("properties", {}):
            if key not in arguments:
                for value in ("x", 1, None, *expected[name].get(key, ())):
                    put("extra", {**arguments, key: value})
        for key, value in arguments.items():
            put("missing", {k: v for k, v in arguments.items() if k != key})
            for kind, change in (("type", other_types), ("value", other_values)):
                for other in change(value):
                    put(kind, {**arguments, key: other})
            for acceptable in expected[name][key]:
                put("value", {**arguments, key: acceptable})
                put("value", {**arguments, key: str(acceptable).lower()})
                for pick in (0, -1) if isinstance(acceptable, dict) else ():
                    members = {k: options[pick] for k, options in acceptable.items() if isinstance(options, list)}
                    put("value", {**arguments, key: members})
    return changed


def judged_answers():
    """Yields (category, row, kind, calls) for every ground truth and for the changes drawn for its row."""
    for category in CATEGORIES:
        if "irrelevance" in category:
            continue
        for row in read_bfcl(category):
            yield category, row, "truth", row.answer
            rng = random.Random(row.id)
            for kind, answers in changed_answers(row).items():
                for calls in rng.sample(answers, min(PER_KIND[kind], len(answers))):
                    yield category, row, kind, calls


def test_agrees_with_the_official_checker(checker):
    functions = {name: raw_functions(name) for name in CATEGORIES}
    verdicts, disagreements = Counter(), []
    for category, row, kind, calls in judged_answers():
        possible = row.columns["possible_answers"]
        theirs = checker(calls, functions[category][row.id], possible, category)
        if bfcl_match(calls, row.tools, possible, category) != theirs:
            disagreements.append((row.id, kind, theirs, calls))
        verdicts[kind, theirs] += 1
    assert not disagreements, (len(disagreements), disagreements[:5])
    changed = {kind: verdicts[kind, True] + verdicts[kind, False] for kind in PER_KIND}
    assert verdicts["truth", True] + verdicts["truth", False] == 2501 and verdicts["truth", False] < 10
    assert sum(changed.values()) >= LEAST, changed
    # Both verdicts must occur for a kind, so that a matcher with a constant verdict fails.
    assert all(verdicts[kind, False] > 1_000 for kind in PER_KIND), verdicts
    assert all(verdicts[kind, True] > 20 for kind in PER_KIND if kind != "calls"), verdicts


@pytest.mark.parametrize("category", ["irrelevance", "live_irrelevance"])
def test_irrelevance_wants_no_call(category):
    """Here the package has no checker and counts decoded calls: none is right, any is wrong."""
    pytest.importorskip("bfcl_eval")
    for row in read_bfcl(category):
        call = {"name": row.tool_names[0] if row.tools else "f", "arguments": {}}
        assert bfcl_match(row.answer, row.tools, [], category)
        assert not bfcl_match([call], row.tools, [], category)
