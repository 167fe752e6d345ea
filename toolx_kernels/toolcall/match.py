"""Exact match of calls with an answer."""

import json


def exact_match(calls: list[dict] | None, answer: list[dict]) -> bool:
    """Whether ``calls`` and ``answer`` are the same multiset of (name, arguments).

    Types are JSON's and strict: True is not 1, and 1 is not 1.0. Order matters inside lists, not between calls or
    keys. None (malformed output) never matches.
    """
    return calls is not None and sorted(map(call_key, calls)) == sorted(map(call_key, answer))


def call_key(call: dict) -> str:
    """A string that two calls share exactly if ``exact_match`` considers them equal."""
    return json.dumps([call["name"], call["arguments"]], sort_keys=True)
