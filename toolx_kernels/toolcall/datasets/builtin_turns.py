"""The builtin-turns task, in two turns: the last call needs values that only other tools return.

A request asks to look something up and to use the result, as in "Please find the number with guest Norville, then
book the room, that number and city Belton.": the model calls ``find_number``, reads "number: 347", and calls
``book_room`` with that. In the tier ``lookup`` one value is looked up; in ``lookups`` a number and a label, by two
calls in one turn. The answer of a row contains the calls of both turns. ``Registry`` is the environment that answers
the lookups; nothing answers the last call, so episodes have ``MAX_TURNS`` turns.

The lookups are always the same. The other tools, names and numbers follow ``builtin``: a tool's name alone determines
its parameters, and held-out rows use tool names, strings and integers that no training row and no cold start contains.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall.datasets.builtin import (
    CALL_SEPARATORS,
    COLD_EDITIONS,
    DETERMINERS,
    INTRODUCTIONS,
    MENTIONS,
    NOISE,
    OPENINGS,
    PARAMETERS,
    SEPARATORS,
    integers,
    signature,
    strings,
    tool_names,
)
from toolx_kernels.toolcall.rows import Row

MAX_TURNS = 2
KEYS = {"number": "guest", "label": "owner"}  # what can be looked up, and by what
TIERS = ("lookup", "lookups")
EXTRA_SHARE = 0.5  # of tools with a parameter whose value the request states
DISTRACTOR_SHARE = 0.5  # of rows that offer a tool that they do not need


class Registry:
    """Answers the lookups of one row from its column ``records``, e.g.
    ``{"number": {"Norville": 347}, "label": {}}``."""

    def reset(self, records: dict[str, dict], **columns) -> None:
        """Begins an episode with these records."""
        self._records = records

    def find_number(self, guest: str) -> str:
        """Find the number.

        Args:
            guest: The guest whose number it is.
        """
        return self._record("number", guest)

    def find_label(self, owner: str) -> str:
        """Find the label.

        Args:
            owner: The owner whose label it is.
        """
        return self._record("label", owner)

    def _record(self, kind: str, key: str) -> str:
        if key not in self._records[kind]:
            raise LookupError(f"no {KEYS[kind]} {key}")
        return _told(kind, self._records[kind][key])


def _told(kind: str, value: str | int) -> str:
    """The result of a lookup, worded like a request, so that a model which copies from requests can copy from it."""
    return f"{kind}: {value}"


@dataclass(frozen=True, slots=True)
class Episode:
    """A supervised example: a row, and the chat messages that answer it, from the first call to the last.

    A turn of the assistant has text as ``content``, or ``calls``, a list of ``{"name", "arguments"}``. Each but the
    last is followed by the ``tool`` messages that answer it, with ``name`` and ``content``.
    """

    row: Row
    turns: list[dict]


@cache
def _types(name: str, edition: int) -> dict[str, str]:
    """Parameters of a tool: one or both of those that can be looked up, perhaps another one."""
    rng = random.Random(f"parameters of {name} in turns, edition {edition}")
    chosen = rng.choice((["number"], ["label"], ["number", "label"]))
    others = [p for p, kind in PARAMETERS.items() if p not in (*KEYS, *KEYS.values()) and kind != "boolean"]
    if rng.random() < EXTRA_SHARE:
        chosen.append(rng.choice(others))
    return {p: PARAMETERS[p] for p in chosen}


@cache
def _names(tier: str, held_out: bool, edition: int) -> tuple[str, ...]:
    wanted = TIERS.index(tier) + 1
    return tuple(n for n in tool_names(held_out) if len(KEYS.keys() & _types(n, edition).keys()) == wanted)


def _row(tier: str, identifier: str, held_out: bool, edition: int, rng: random.Random) -> Row:
    name = rng.choice(_names(tier, held_out, edition))
    types = _types(name, edition)
    # no value twice in a row: the request must not contain a value that is looked up
    texts, numbers = iter(rng.sample(strings(held_out), 4)), iter(rng.sample(integers(held_out), 2))
    values: dict[str, Iterator] = {"string": texts, "integer": numbers}
    arguments = {p: next(values[kind]) for p, kind in types.items()}
    sought = [p for p in rng.sample(list(KEYS), len(KEYS)) if p in types]
    keys = {kind: next(values["string"]) for kind in sought}
    lookups = [{"name": f"find_{kind}", "arguments": {KEYS[kind]: keys[kind]}} for kind in sought]

    offered = [signature(f"find_{kind}", {key: "string"}) for kind, key in KEYS.items()]
    others = [n for n in tool_names(held_out) if n != name]
    own = [name, *rng.sample(others, int(rng.random() < DISTRACTOR_SHARE))]
    offered += [signature(n, _types(n, edition)) for n in rng.sample(own, len(own))]

    told = {p: value for p, value in arguments.items() if p not in sought}
    order = {p: arguments[p] for p in (*sought, *told)}
    answer = [*lookups, {"name": name, "arguments": order}]
    records = {kind: {keys[kind]: arguments[kind]} if kind in sought else {} for kind in KEYS}
    return Row(identifier, _request(name, keys, told, rng), offered, answer, {"tier": tier, "records": records})


def _request(name: str, keys: dict[str, str], told: dict[str, str | int], rng: random.Random) -> str:
    """A request in the words of ``builtin``, so that its vocabulary contains them."""
    introduction, mention, separator = rng.choice(INTRODUCTIONS), rng.choice(MENTIONS), rng.choice(SEPARATORS)
    lookups = (
        f"find the {kind}{introduction}{mention.format(name=KEYS[kind], value=key)}" for kind, key in keys.items()
    )
    verb, noun = name.split("_")
    uses = [*keys, *(mention.format(name=p, value=value) for p, value in told.items())]
    last = f"{verb}{rng.choice(DETERMINERS)}{noun}, that {separator.join(uses)}"
    return rng.choice(OPENINGS) + separator.join(lookups) + rng.choice(CALL_SEPARATORS) + last + "."


def _rows(count: int, seed: int, tiers: Sequence[str], held_out: bool) -> list[Row]:
    for tier in tiers:
        if tier not in TIERS:
            raise InputError(f"unknown tier {tier!r} of the built-in task in turns: use some of {', '.join(TIERS)}.")
    rng = random.Random(f"{'held-out' if held_out else 'train'} rows in turns {seed}")
    chosen = [tiers[i % len(tiers)] for i in range(count)]
    return [_row(tier, f"{tier}-{i}", held_out, 0, rng) for i, tier in enumerate(chosen)]


def train_rows(count: int, seed: int, tiers: Sequence[str] = TIERS) -> list[Row]:
    """``count`` training rows, of each tier in turn; the same ``seed`` gives the same rows.

    Raises InputError for an unknown tier.
    """
    return _rows(count, seed, tiers, held_out=False)


def heldout_rows(count: int, seed: int, tiers: Sequence[str] = TIERS) -> list[Row]:
    """``count`` evaluation rows; they share no tool name (except the lookups), string or integer with training rows.

    Raises InputError for an unknown tier.
    """
    return _rows(count, seed, tiers, held_out=True)


def turns_of(row: Row, last: dict) -> list[dict]:
    """The turns that answer ``row`` with ``last`` as the last call, for ``supervised_episode``."""
    lookups = row.answer[:-1]
    results = []
    for call in lookups:
        kind = call["name"].removeprefix("find_")
        value = row.columns["records"][kind][call["arguments"][KEYS[kind]]]
        results.append({"role": "tool", "name": call["name"], "content": _told(kind, value)})
    return [
        {"role": "assistant", "content": "", "calls": lookups},
        *results,
        {"role": "assistant", "content": "", "calls": [last]},
    ]


def cold_start_episodes(seed: int) -> Iterator[Episode]:
    """An endless stream of supervised episodes of both tiers.

    As in the cold start of ``builtin``, parameters of a tool change from example to example, so that a model must read
    them from the signatures, and part of the examples has a deliberate mistake that reinforcement learning can correct:
    the integers of the last call are in quotes.
    """
    rng = random.Random(f"cold start in turns {seed}")
    for index in itertools.count():
        edition = rng.randint(1, COLD_EDITIONS)
        row = _row(rng.choice(TIERS), f"cold-{index}", False, edition, rng)
        last = row.answer[-1]
        if rng.random() < NOISE["quoted_integers"]:
            quoted = {p: str(v) if isinstance(v, int) else v for p, v in last["arguments"].items()}
            last = {"name": last["name"], "arguments": quoted}
        yield Episode(row, turns_of(row, last))
