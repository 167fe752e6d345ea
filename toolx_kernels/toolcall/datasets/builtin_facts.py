"""The builtin-facts task, with facts that exploration seldom finds: codes that only demonstrations reveal.

Tools, requests and the tiers easy and hard are those of ``builtin``, but a tool's noun alone determines its kind:
plain, ``office`` (all such tools share a code: one fact) or ``account`` (the tools of one noun share a code: one fact
per noun). No request mentions a code and no signature lists them. There are 141 codes, each one token of the tiny
model. The cold start teaches ``COLD_CODE``, which is always wrong, and copying of the code that demonstrations show.

The tier ``convention`` of ``builtin`` (a ``currency``, one of four that the signature lists) occurs only in the cold
start. Among training rows it would defeat the task: a model that is rewarded for giving up one wrong habit gives up the
others too, then draws codes nearly uniformly, and finds the facts by chance.

``documentation`` has a solved row for each tool that training rows offer; only these rows are demonstrations. Held-out
rows share the facts with it and with training rows, but no tool name, string or integer.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall.datasets import builtin
from toolx_kernels.toolcall.datasets.builtin import (
    Example,
    distractors,
    imitated,
    request,
    signature,
    tool_names,
    value,
)
from toolx_kernels.toolcall.demonstrations import DemonstrationIndex
from toolx_kernels.toolcall.rows import Row

NOUNS = {
    "account": ("flight", "report", "tour"),
    "office": ("ticket", "contract", "garden", "parcel", "lesson"),
    "plain": tuple("table invoice meeting car course boat dinner museum hotel concert package room".split()),
}
KIND_OF_NOUN = {noun: kind for kind, nouns in NOUNS.items() for noun in nouns}
UNTOLD = {"convention": "currency", "office": "office", "account": "account"}  # the argument that no request mentions
TRAINED_VERBS = 3  # of each noun, in training rows and documentation

COLD_CODE = "A0A"
# Tokens that values in requests consist of: with several hundred tokens that occur nowhere else, the cold start learned
# on some seeds that a code is expected, but not to copy it.
_PIECES = (*builtin.STRING_HEADS, *builtin.STRING_TAILS)
_NUMBERS = tuple(str(number) for number in range(11, 100))
CODES = (*(code for pair in zip(_NUMBERS, _PIECES, strict=False) for code in pair), *_NUMBERS[len(_PIECES) :])

# What the cold start writes without demonstrations.
HABITS = {"convention": builtin.COLD_CURRENCY, "office": COLD_CODE, "account": COLD_CODE}

LEVELS = {tier: builtin.LEVELS[tier] for tier in ("easy", "hard", "convention")}
LEVELS |= dict.fromkeys(("office", "account"), builtin.LEVELS["convention"])
TIERS = ("easy", "hard", "office", "account", "account")  # of rows: twice as many for the narrow facts
MOST_DISTRACTORS = 3  # that documentation offers

Untold = Callable[[str, str], str]  # kind and noun of a tool -> the value of its untold argument

# The cold start: its easy beginning, its mix after that, and the share of demonstrations.
COLD_EDITIONS = 100
COLD_KINDS = {"plain": 0.5, "convention": 0.15, "office": 0.15, "account": 0.2}
COLD_EASY_EXAMPLES = 4800
COLD_MIX = {"easy": 0.15, "hard": 0.25, "convention": 0.15, "office": 0.2, "account": 0.25}
COLD_SHOWN_MIX = {"easy": 0.1, "hard": 0.2, "convention": 0.1, "office": 0.3, "account": 0.3}
COLD_DEMONSTRATED = 0.6
# The tiny model learns to copy codes in stages: easy requests contain codes as values, then come examples that need a
# demonstration, and these show few codes at first.
COLD_TOLD_CODES = 0.3  # of an easy request's strings
COLD_COPYING_EXAMPLES = 3200
COLD_FIRST_CODES = 8
COLD_EXAMPLES_A_CODE = 24  # until demonstrations show one more


@dataclass(frozen=True, slots=True)
class Fact:
    """A fact that a row's answer contains and its request does not: the ``value`` of an ``argument``."""

    name: str
    argument: str
    value: str


@cache
def required(kind: str, noun: str) -> str:
    """The required value of the untold argument of a tool of this kind and noun."""
    codes = CODES[len(CODES) // 2 :]  # those that the cold start shows last and least
    office, *accounts = random.Random("facts").sample(codes, 1 + len(NOUNS["account"]))
    return office if kind == "office" else accounts[NOUNS["account"].index(noun)]


@cache
def _facts() -> tuple[str, ...]:
    """The codes that are required somewhere."""
    return tuple(required(kind, noun) for kind in ("office", "account") for noun in NOUNS[kind])


def fact_of(row: Row) -> Fact | None:
    """The fact that a row of this task or of ``builtin`` needs; None for any other row."""
    tier = row.columns.get("tier")
    if tier not in UNTOLD:
        return None
    (call,) = row.answer
    name = f"account of {call['name'].split('_')[1]}" if tier == "account" else tier
    return Fact(name, UNTOLD[tier], call["arguments"][UNTOLD[tier]])


@dataclass(frozen=True, slots=True)
class _Catalogue:
    """The tools of training rows, the held-out tools, or all that are not held out (``side`` "cold").

    ``edition`` determines kind and parameters of a name: 0 in rows, many others in the cold start, so that nothing can
    be known by name. ``told_codes`` is the share of strings that are codes.
    """

    side: str
    edition: int = 0
    told_codes: float = 0.0

    @property
    def held_out(self) -> bool:
        return self.side == "held-out"

    def kind(self, name: str) -> str:
        return _kind(name, self.edition)

    def types(self, name: str) -> dict[str, str]:
        return _types(name, self.edition)

    def value(self, kind: str, rng: random.Random) -> str | int | bool:
        if self.told_codes and kind == "string" and rng.random() < self.told_codes:
            return rng.choice(CODES)
        drawn = value(kind, self.held_out, rng)
        # no value in a training row contains a fact's token: copied into the wrong place, it would find the fact
        while self.side != "cold" and any(code in str(drawn) for code in _facts()):
            drawn = value(kind, self.held_out, rng)
        return drawn

    def names(self, kind: str, low: int = 1, high: int = 3) -> tuple[str, ...]:
        """The tools of a kind that have ``low`` to ``high`` arguments, not counting the untold one."""
        return _sized(self, kind, low, high)


@cache
def _names(side: str) -> tuple[str, ...]:
    names = tool_names(side == "held-out")
    if side != "train":
        return names
    of_noun = ([name for name in names if name.endswith(f"_{noun}")] for noun in builtin.NOUNS)
    return tuple(name for of_one in of_noun for name in of_one[:TRAINED_VERBS])


@cache
def _kind(name: str, edition: int) -> str:
    if not edition:
        return KIND_OF_NOUN[name.split("_")[1]]
    return _drawn(COLD_KINDS, random.Random(f"kind of {name}, edition {edition}"))


@cache
def _types(name: str, edition: int) -> dict[str, str]:
    rng, kind = random.Random(f"parameters of {name} with facts, edition {edition}"), _kind(name, edition)
    chosen = rng.sample(list(builtin.PARAMETERS), rng.randint(1, 3 if kind == "plain" else 2))
    return {p: builtin.PARAMETERS[p] for p in chosen} | ({} if kind == "plain" else {UNTOLD[kind]: "string"})


@cache
def _sized(catalogue: _Catalogue, kind: str, low: int, high: int) -> tuple[str, ...]:
    of_kind = [name for name in _names(catalogue.side) if catalogue.kind(name) == kind]
    return tuple(n for n in of_kind if low <= len(catalogue.types(n)) - (kind != "plain") <= high)


def _drawn(shares: dict[str, float], rng: random.Random) -> str:
    return rng.choices(list(shares), list(shares.values()))[0]


def _for_kind(values: dict[str, str]) -> Untold:
    return lambda kind, noun: values[kind]


def _solved(
    identifier: str, name: str, others: Sequence[str], catalogue: _Catalogue, untold: Untold, rng: random.Random
) -> Row:
    """A row whose answer calls ``name`` and that also offers ``others``."""
    own = [(p, kind) for p, kind in catalogue.types(name).items() if p not in UNTOLD.values()]
    arguments = {p: catalogue.value(kind, rng) for p, kind in rng.sample(own, len(own))}
    kind = catalogue.kind(name)
    if kind in UNTOLD:
        arguments[UNTOLD[kind]] = untold(kind, name.split("_")[1])
    call = {"name": name, "arguments": arguments}
    offered = rng.sample([name, *others], 1 + len(others))
    tools = [signature(n, catalogue.types(n)) for n in offered]
    return Row(identifier, request([call], rng, UNTOLD.values()), tools, [call])


def _row(tier: str, identifier: str, catalogue: _Catalogue, untold: Untold, rng: random.Random) -> Row:
    level = LEVELS[tier]
    name = rng.choice(catalogue.names(tier if tier in UNTOLD else "plain", *level.arguments))
    others = distractors(name, catalogue.names("plain", *level.arguments), level.similar, rng)
    row = _solved(identifier, name, others[: rng.randint(*level.offered) - 1], catalogue, untold, rng)
    return replace(row, columns={"tier": tier})


def _rows(count: int, seed: int, tiers: Sequence[str], side: str) -> list[Row]:
    for tier in tiers:
        if tier not in TIERS:
            known = ", ".join(dict.fromkeys(TIERS))
            raise InputError(f"unknown tier {tier!r} of the built-in task with facts: use some of {known}.")
    rng, catalogue = random.Random(f"{side} rows with facts {seed}"), _Catalogue(side)
    chosen = [tiers[i % len(tiers)] for i in range(count)]
    return [_row(tier, f"{tier}-{i}", catalogue, required, rng) for i, tier in enumerate(chosen)]


def train_rows(count: int, seed: int, tiers: Sequence[str] = TIERS) -> list[Row]:
    """``count`` training rows, of each tier in turn; the same ``seed`` gives the same rows.

    Raises InputError for an unknown tier.
    """
    return _rows(count, seed, tiers, "train")


def heldout_rows(count: int, seed: int, tiers: Sequence[str] = TIERS) -> list[Row]:
    """``count`` evaluation rows, of each tier in turn; they share facts with training rows, but no tool name, string or
    integer.

    Raises InputError for an unknown tier.
    """
    return _rows(count, seed, tiers, "held-out")


def documentation() -> list[Row]:
    """One solved row for each tool that training rows offer, always the same; each offers up to three other tools."""
    rng, catalogue = random.Random("documentation"), _Catalogue("train")
    rows = []
    for name in _names("train"):
        others = distractors(name, catalogue.names("plain"), False, rng)[: rng.randint(0, MOST_DISTRACTORS)]
        rows.append(_solved(f"documentation-{name}", name, others, catalogue, required, rng))
    return rows


def cold_start_examples(seed: int) -> Iterator[Example]:
    """An endless stream of supervised examples, in training order.

    First ``COLD_EASY_EXAMPLES`` of the tier easy; then ``COLD_COPYING_EXAMPLES`` with demonstrations, of tiers where
    these reveal what no request does; then a mix, a share ``COLD_DEMONSTRATED`` of it with demonstrations
    (``COLD_SHOWN_MIX``, else ``COLD_MIX``). Demonstrations are drawn as in training, from a solved row of each offered
    tool. Without them the target has the deliberate mistakes of ``builtin`` (``NOISE``) and ``HABITS``; with them it is
    right, and its untold currency or code is drawn for this example alone.
    """
    rng = random.Random(f"cold start with facts {seed}")
    for index in itertools.count():
        mixed = index - COLD_EASY_EXAMPLES
        easy, copying = mixed < 0, 0 <= mixed < COLD_COPYING_EXAMPLES
        catalogue = _Catalogue("cold", rng.randint(1, COLD_EDITIONS), COLD_TOLD_CODES if easy else 0.0)
        if copying or not easy and rng.random() < COLD_DEMONSTRATED:
            tier = rng.choice(list(UNTOLD)) if copying else _drawn(COLD_SHOWN_MIX, rng)
            code = rng.choice(CODES[: COLD_FIRST_CODES + mixed // COLD_EXAMPLES_A_CODE])
            untold = _for_kind({"convention": rng.choice(builtin.CURRENCIES), "office": code, "account": code})
            row = _row(tier, f"cold-{index}", catalogue, untold, rng)
            solved = [_solved(f"{row.id}-{name}", name, (), catalogue, untold, rng) for name in row.tool_names]
            shown = DemonstrationIndex(solved).choose(row, rng)
            if tier not in UNTOLD or any(other.answer[0]["name"] == row.answer[0]["name"] for other in shown):
                yield Example(row, tuple(shown), row.answer)
        else:
            tier = "easy" if easy else _drawn(COLD_MIX, rng)
            row = _row(tier, f"cold-{index}", catalogue, _for_kind(HABITS), rng)
            yield Example(row, (), imitated(row.answer, rng))
