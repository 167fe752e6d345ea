import copy
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolx_kernels.toolcall import exact_match

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)
calls = st.lists(
    st.fixed_dictionaries({"name": st.text(), "arguments": st.dictionaries(st.text(), values, max_size=4)}), max_size=4
)


def leaves(value, path=()):
    if isinstance(value, dict | list) and value:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, key))
    else:
        yield path


def shuffled_keys(value, rng):
    if isinstance(value, dict):
        items = [(key, shuffled_keys(item, rng)) for key, item in value.items()]
        rng.shuffle(items)
        return dict(items)
    return [shuffled_keys(item, rng) for item in value] if isinstance(value, list) else value


@given(calls, st.randoms(use_true_random=False))
def test_order_of_calls_and_keys_is_irrelevant(calls, rng):
    other = shuffled_keys(copy.deepcopy(calls), rng)
    rng.shuffle(other)
    assert exact_match(calls, other) and exact_match(other, calls)


@given(calls.filter(bool), st.data())
def test_any_changed_leaf_is_seen(calls, data):
    path = data.draw(st.sampled_from([path for path in leaves(calls) if path]))
    other = copy.deepcopy(calls)
    inner = other
    for key in path[:-1]:
        inner = inner[key]
    changed = data.draw(st.text() if path[-1] == "name" and len(path) == 2 else values)
    before = inner[path[-1]]
    inner[path[-1]] = changed
    # repr distinguishes True, 1 and 1.0, as JSON does, but also -0.0 and 0.0.
    one, two = (re.sub(r"-0\.0\b", "0.0", repr(shuffled_keys(value, NO_SHUFFLE))) for value in (before, changed))
    same = one == two
    if not same and not (isinstance(before, dict) and before == changed):
        assert not exact_match(other, calls)
    assert not exact_match(calls[1:], calls)
    assert not exact_match([*calls, calls[0]], calls)


class NoShuffle(random.Random):
    def shuffle(self, items):
        items.sort(key=lambda item: item[0])


NO_SHUFFLE = NoShuffle()


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"a": 1}, {"a": 1}, True),
        ({"a": 1}, {"a": 1.0}, False),
        ({"a": 1}, {"a": True}, False),
        ({"a": 0}, {"a": False}, False),
        ({"a": 1}, {"a": "1"}, False),
        ({"a": None}, {}, False),
        ({"a": 0.1}, {"a": 0.10}, True),
        ({"a": [0.0, "-0.0"]}, {"a": [-0.0, "-0.0"]}, True),
        ({"a": "-0.0"}, {"a": "0.0"}, False),
        ({"a": -0.05}, {"a": 0.05}, False),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True),
        ({"a": [1, 2]}, {"a": [2, 1]}, False),
        ({"a": {"b": [{"c": 1}]}}, {"a": {"b": [{"c": 2}]}}, False),
        ({"a": "X"}, {"a": "x"}, False),
        ({"a": []}, {"a": {}}, False),
    ],
)
def test_values(one, other, same):
    assert exact_match([{"name": "f", "arguments": one}], [{"name": "f", "arguments": other}]) is same


def test_multiset():
    a, b = ({"name": name, "arguments": {}} for name in "ab")
    assert exact_match([a, b, a], [a, a, b])
    assert not exact_match([a, b, b], [a, a, b]) and not exact_match([a, b], [a, a, b]) and not exact_match([a], [b])
    assert exact_match([], []) and not exact_match(None, []) and not exact_match(None, [a])


NUMBER, INTEGER = {"type": "number"}, {"type": "integer"}
ONE_OR_NONE = {
    "type": "object",
    "properties": {
        "x": NUMBER, "n": INTEGER, "s": {"type": "string"}, "any": {}, "maybe": {"type": ["number", "null"]},
        "null": {"type": "number", "nullable": True}, "list": {"type": "array", "items": NUMBER},
        "pair": {"prefixItems": [{}, NUMBER]}, "old": {"items": [{}, NUMBER]},
        "o": {"properties": {"in": NUMBER}}, "more": {"additionalProperties": NUMBER},
        "named": {"patternProperties": {"^n": NUMBER}}, "either": {"anyOf": [{"type": "string"}, NUMBER]},
        "one": {"oneOf": [{"type": "array", "items": INTEGER}, {"type": "null"}]}, "all": {"allOf": [{}, NUMBER]},
        "ref": {"$ref": "#/$defs/n"}, "tree": {"$ref": "#/$defs/tree"}, "enum": {"enum": [1, 2.5]},
        "flag": {"type": "boolean"}, "not": {"not": NUMBER},
    },
    "$defs": {"n": NUMBER, "tree": {"properties": {"value": NUMBER, "left": {"$ref": "#/$defs/tree"}}}},
}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": ONE_OR_NONE}}]
BIG = 2**53


@pytest.mark.parametrize(
    ("name", "one", "other", "same"),
    [
        ("x", 1, 1.0, True),
        ("x", 0, -0.0, True),
        ("x", 1, 1.5, False),
        ("x", 1, True, False),
        ("x", 1.0, True, False),
        ("x", 1, "1", False),
        ("x", BIG, float(BIG), True),
        ("x", BIG + 1, float(BIG), False),
        ("x", 10**300, 1e300, False),
        ("x", int(1e300), 1e300, True),
        ("x", 10**4000, 1e300, False),
        ("n", 1, 1.0, True),
        ("n", 1, True, False),
        ("s", 1, 1.0, False),
        ("any", 1, 1.0, False),
        ("flag", 1, 1.0, False),
        ("not", 1, 1.0, False),
        ("unknown", 1, 1.0, False),
        ("maybe", 1, 1.0, True),
        ("null", 1, 1.0, True),
        ("null", None, 0, False),
        ("list", [1, 2.5], [1.0, 2.5], True),
        ("list", [1, 2], [2.0, 1.0], False),
        ("pair", [1, 1], [1, 1.0], True),
        ("pair", [1, 1], [1.0, 1], False),
        ("old", [1, 1], [1, 1.0], True),
        ("o", {"in": 1}, {"in": 1.0}, True),
        ("o", {"out": 1}, {"out": 1.0}, False),
        ("more", {"k": 1}, {"k": 1.0}, True),
        ("named", {"n1": 1}, {"n1": 1.0}, True),
        ("named", {"m1": 1}, {"m1": 1.0}, False),
        ("either", 1, 1.0, True),
        ("one", [1], [1.0], True),
        ("all", 1, 1.0, True),
        ("ref", 1, 1.0, True),
        ("tree", {"left": {"left": {"value": 1}}}, {"left": {"left": {"value": 1.0}}}, True),
        ("enum", 1, 1.0, True),
    ],
)
def test_1_is_1_0_where_the_schema_has_a_number(name, one, other, same):
    one, other = ([{"name": "f", "arguments": {name: value}}] for value in (one, other))
    for tools in (TOOLS, [TOOLS[0]["function"]]):
        assert exact_match(one, other, tools) is exact_match(other, one, tools) is same
    assert not exact_match(one, other) and not exact_match(one, other, [])
    assert exact_match([*one, *other], [*other, *one], TOOLS)
    assert exact_match([*one, *one], [*other, *one], TOOLS) is same


def test_tools_that_are_no_functions_compare_strictly():
    one, other = ([{"name": "f", "arguments": {"x": value}}] for value in (1, 1.0))
    broken = [{"properties": {"x": {"type": "float"}}}, {"properties": {"x": {"$ref": "https://a.b"}}}, "text", None]
    unusable = [[{"name": "f", "parameters": schema}] for schema in broken]
    for tools in (
        *unusable,
        [{"name": "g", "parameters": ONE_OR_NONE}],
        [{"name": "f"}],
        [{"name": []}],
        ["f"],
        [None],
    ):
        assert not exact_match(one, other, tools) and exact_match(one, one, tools)


ANYWHERE = {"items": {"$ref": "#"}, "additionalProperties": {"$ref": "#"}, "anyOf": [{"type": "number"}, {}]}
ALIKE = st.recursive(
    st.sampled_from([0, 0.0, 1, 1.0, True, False, None, "1", BIG, float(BIG), BIG + 1, 1.5]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=6,
)


def equal(one, other):
    """Equality of JSON values by the meaning of JSON Schema."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


@settings(derandomize=True, deadline=None, max_examples=100)
@given(ALIKE, ALIKE)
def test_with_numbers_everywhere_equality_is_json_schemas(one, other):
    tools = [{"name": "f", "parameters": ANYWHERE}]
    calls, answer = ([{"name": "f", "arguments": {"v": value}}] for value in (one, other))
    assert exact_match(calls, answer, tools) == equal(one, other)
