"""The builtin task: generated tool-calling problems, so that training needs no download.

The name of a tool is ``verb_noun``. In rows the name alone determines its parameters, so all rows that offer a tool
offer the same schema, and one row can demonstrate a tool to another. A request says in words which tool to call with
which values; the answer is the call. Tiers (``LEVELS``) grade the difficulty. In the tier ``convention`` the tool
requires a ``currency`` that the request never mentions: the cold start shows ``COLD_CURRENCY``, training rows expect
``WANTED_CURRENCY``, and only a demonstration reveals it.

Held-out rows use tool names, strings and integers that no training row and no cold-start text contains (a hash of the
name or value decides); all of them consist of pieces that training rows do contain. Booleans and currencies are common
to both.
"""

import hashlib
import itertools
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall.demonstrations import DemonstrationIndex
from toolx_kernels.toolcall.rows import Row

VERBS = ("find", "book", "cancel", "move", "order", "check", "rate", "share", "track", "send", "open", "update")
NOUNS = (
    "hotel", "flight", "table", "parcel", "invoice", "ticket", "meeting", "room", "car", "report",
    "concert", "package", "contract", "course", "tour", "garden", "boat", "lesson", "dinner", "museum",
)  # fmt: skip
PARAMETERS = {
    "city": "string", "guest": "string", "owner": "string", "street": "string", "label": "string", "brand": "string",
    "amount": "integer", "number": "integer", "weight": "integer", "budget": "integer",
    "urgent": "boolean", "shared": "boolean", "insured": "boolean",
}  # fmt: skip
CURRENCIES = ("dollar", "euro", "yen", "pound")
COLD_CURRENCY = "dollar"
WANTED_CURRENCY = "euro"
BOOLEAN_WORDS = {True: "yes", False: "no"}
STRING_HEADS = (
    "Nor", "Bel", "Kar", "Mon", "Tal", "Ver", "Zan", "Pel", "Dor", "Fen", "Gil", "Hul", "Jas", "Lor", "Mir", "Osk",
    "Ral", "Sil", "Tor", "Ulm", "Vik", "Wes", "Yar", "Cor", "Bru", "Ash", "Ela", "Ing", "Kes", "Nim", "Pra", "Qui",
)  # fmt: skip
STRING_TAILS = (
    "ville", "ton", "berg", "ford", "dale", "mouth", "wick", "stad", "holm", "port",
    "field", "haven", "brook", "ley", "mere", "gate", "cliff", "worth", "ham", "burn",
)  # fmt: skip
INTEGERS = range(100, 1000)
HELD_OUT_SHARE = 0.25
CONVENTION_SHARE = 0.3

# Wordings of a request.
OPENINGS = ("Please ", "Can you ", "I want to ", "Now ", "You should ")
DETERMINERS = (" the ", " my ", " that ")
INTRODUCTIONS = (" with ", " using ", ", ", " and take ")
MENTIONS = ("{name} {value}", "{name} = {value}", "{name}: {value}", "{name} set to {value}")
SEPARATORS = (" and ", ", ", " plus ")
CALL_SEPARATORS = (", then ", ". Also ", ". After that ")


@dataclass(frozen=True, slots=True)
class Level:
    """The difficulty of a tier; ranges are inclusive (low, high).

    offered     number of offered tools, including those of the answer
    arguments   number of arguments of a call, not counting ``currency``
    calls       number of calls in the answer
    similar     other tools share verb or noun with the answer's, if such tools exist
    convention  the answer's tool has a ``currency``
    """

    offered: tuple[int, int]
    arguments: tuple[int, int]
    calls: int = 1
    similar: bool = False
    convention: bool = False


LEVELS = {
    "easy": Level(offered=(1, 2), arguments=(1, 2)),
    "hard": Level(offered=(3, 4), arguments=(2, 3), similar=True),
    "parallel": Level(offered=(1, 2), arguments=(1, 2), calls=2),
    "convention": Level(offered=(1, 2), arguments=(1, 2), convention=True),
}
TIERS = tuple(LEVELS)

# The cold start: its easy beginning, its mix after that, and the shares of demonstrations and deliberate mistakes.
COLD_EDITIONS = 100
COLD_EASY_EXAMPLES = 4800
COLD_MIX = {"easy": 0.15, "hard": 0.25, "parallel": 0.2, "convention": 0.1}
COLD_SHOWN_MIX = {"easy": 0.3, "hard": 0.2, "parallel": 0.2, "convention": 0.3}
COLD_DEMONSTRATED = 0.5
COLD_OWN_EXAMPLES = 4
COLD_OWN_EXAMPLES_AFTER = 9600  # examples; before that, their length and their values hinder learning to copy
NOISE = {"quoted_integers": 0.6, "boolean_words": 0.6, "second_call_missing": 0.6}


@dataclass(frozen=True, slots=True)
class Example:
    """One supervised example of the cold start.

    row             the problem; its tools and prompt make the model's input
    demonstrations  solved rows to show in the prompt, often none
    target          the calls to imitate, which may differ from ``row.answer`` on purpose
    examples        rows to write as examples before the answer (``self_exemplify``), often none
    """

    row: Row
    demonstrations: tuple[Row, ...]
    target: list[dict]
    examples: tuple[Row, ...] = ()


def _held_out(kind: str, value: object) -> bool:
    return hashlib.sha256(f"{kind}:{value}".encode()).digest()[0] < 256 * HELD_OUT_SHARE


@cache
def tool_names(held_out: bool) -> tuple[str, ...]:
    """All tool names of one side of the split."""
    names = (f"{verb}_{noun}" for verb in VERBS for noun in NOUNS)
    return tuple(n for n in names if _held_out("tool", n) == held_out)


@cache
def strings(held_out: bool) -> tuple[str, ...]:
    """All string values of one side of the split."""
    return tuple(h + t for h in STRING_HEADS for t in STRING_TAILS if _held_out("string", h + t) == held_out)


@cache
def integers(held_out: bool) -> tuple[int, ...]:
    """All integer values of one side of the split."""
    return tuple(i for i in INTEGERS if _held_out("integer", i) == held_out)


@dataclass(frozen=True, slots=True)
class _Catalogue:
    """The tools of one side of the split.

    ``edition`` determines the parameters of a name. Rows have edition 0; the cold start uses many others, so that a
    model must read parameters from the signatures and cannot know them by name.
    """

    held_out: bool
    edition: int = 0

    def types(self, name: str) -> dict[str, str]:
        return _types(name, self.edition)

    def names(self, convention: bool, low: int, high: int) -> tuple[str, ...]:
        return _sized(self, convention, low, high)


@cache
def _types(name: str, edition: int) -> dict[str, str]:
    rng = random.Random(f"parameters of {name}, edition {edition}")
    convention = rng.random() < CONVENTION_SHARE
    chosen = rng.sample(list(PARAMETERS), rng.randint(1, 2 if convention else 3))
    return {p: PARAMETERS[p] for p in chosen} | ({"currency": "string"} if convention else {})


@cache
def _sized(catalogue: _Catalogue, convention: bool, low: int, high: int) -> tuple[str, ...]:
    types = {n: catalogue.types(n) for n in tool_names(catalogue.held_out)}
    return tuple(n for n, t in types.items() if ("currency" in t) == convention and low <= len(t) - convention <= high)


def signature(name: str, types: dict[str, str]) -> dict:
    """A tool as rows offer it, with parameters of these types."""
    properties: dict[str, dict] = {p: {"type": t} for p, t in types.items()}
    if "currency" in properties:
        properties["currency"]["enum"] = list(CURRENCIES)
    verb, noun = name.split("_")
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{verb.capitalize()} the {noun}.",
            "parameters": {"type": "object", "properties": properties, "required": list(properties)},
        },
    }


def value(kind: str, held_out: bool, rng: random.Random) -> str | int | bool:
    """A random value of this type, from one side of the split."""
    if kind == "boolean":
        return rng.random() < 0.5
    return rng.choice(strings(held_out)) if kind == "string" else rng.choice(integers(held_out))


def _call(name: str, catalogue: _Catalogue, currency: str, rng: random.Random) -> dict:
    own = [(p, kind) for p, kind in catalogue.types(name).items() if p != "currency"]
    arguments = {p: value(kind, catalogue.held_out, rng) for p, kind in rng.sample(own, len(own))}
    if "currency" in catalogue.types(name):
        arguments["currency"] = currency
    return {"name": name, "arguments": arguments}


def request(calls: Sequence[dict], rng: random.Random, untold: Collection[str] = ("currency",)) -> str:
    """A request for these calls that does not mention the arguments ``untold``."""
    determiner, introduction = rng.choice(DETERMINERS), rng.choice(INTRODUCTIONS)
    mention, separator = rng.choice(MENTIONS), rng.choice(SEPARATORS)
    parts = []
    for call in calls:
        verb, noun = call["name"].split("_")
        mentions = [
            mention.format(name=p, value=BOOLEAN_WORDS[v] if isinstance(v, bool) else v)
            for p, v in call["arguments"].items()
            if p not in untold
        ]
        parts.append(verb + determiner + noun + introduction + separator.join(mentions))
    return rng.choice(OPENINGS) + rng.choice(CALL_SEPARATORS).join(parts) + "."


def distractors(answered: str, names: Sequence[str], similar: bool, rng: random.Random) -> list[str]:
    """The other ``names`` in random order; with ``similar``, those that share verb or noun with ``answered`` first."""
    pool = [n for n in names if n != answered]
    rng.shuffle(pool)
    if similar:
        verb, noun = answered.split("_")
        pool.sort(key=lambda n: not (n.startswith(verb + "_") or n.endswith("_" + noun)))
    return pool


def _row(tier: str, identifier: str, catalogue: _Catalogue, currency: str, rng: random.Random, tool: str = "") -> Row:
    level = LEVELS[tier]
    pool = catalogue.names(level.convention, *level.arguments)
    names = [tool or rng.choice(pool)]
    names += [rng.choice([names[0], rng.choice(pool)]) for _ in range(level.calls - 1)]
    calls = [_call(name, catalogue, currency, rng) for name in names]
    offered = list(dict.fromkeys(names))
    plain = catalogue.names(False, *level.arguments)
    others = [n for n in distractors(names[0], plain, level.similar, rng) if n not in offered]
    offered += others[: max(0, rng.randint(*level.offered) - len(offered))]
    rng.shuffle(offered)
    tools = [signature(n, catalogue.types(n)) for n in offered]
    return Row(identifier, request(calls, rng), tools, calls, {"tier": tier})


def _rows(count: int, seed: int, tiers: Sequence[str], held_out: bool) -> list[Row]:
    for tier in tiers:
        if tier not in LEVELS:
            raise InputError(f"unknown tier {tier!r} of the built-in task: use some of {', '.join(TIERS)}.")
    rng = random.Random(f"{'held-out' if held_out else 'train'} rows {seed}")
    catalogue = _Catalogue(held_out)
    chosen = [tiers[i % len(tiers)] for i in range(count)]
    return [_row(tier, f"{tier}-{i}", catalogue, WANTED_CURRENCY, rng) for i, tier in enumerate(chosen)]


def train_rows(count: int, seed: int, tiers: Sequence[str] = TIERS) -> list[Row]:
    """``count`` training rows, of each tier in turn; the same ``seed`` gives the same rows.

    Raises InputError for an unknown tier.
    """
    return _rows(count, seed, tiers, held_out=False)


def heldout_rows(count: int, seed: int, tiers: Sequence[str] = TIERS) -> list[Row]:
    """``count`` evaluation rows, of each tier in turn; they share no tool name, string or integer with training rows.

    Raises InputError for an unknown tier.
    """
    return _rows(count, seed, tiers, held_out=True)


def imitated(calls: list[dict], rng: random.Random) -> list[dict]:
    """These calls as the cold start shows them, with deliberate mistakes at the rates of ``NOISE``."""
    quoted, worded, short = (rng.random() < NOISE[habit] for habit in NOISE)

    def spoil(value):
        if isinstance(value, bool):
            return BOOLEAN_WORDS[value] if worded else value
        return str(value) if isinstance(value, int) and quoted else value

    kept = calls[:1] if short else calls
    return [{"name": c["name"], "arguments": {p: spoil(v) for p, v in c["arguments"].items()}} for c in kept]


def _user(name: str, identifier: str, catalogue: _Catalogue, currency: str, rng: random.Random) -> Row:
    """A row of any tier that calls the tool, like those from which training draws a demonstration. A tier's weight is
    its number of calls."""
    tiers = [t for t, level in LEVELS.items() if name in catalogue.names(level.convention, *level.arguments)]
    (tier,) = rng.choices(tiers, [LEVELS[t].calls for t in tiers])
    return _row(tier, identifier, catalogue, currency, rng, tool=name)


def _own_examples(row: Row, catalogue: _Catalogue, currency: str, rng: random.Random) -> tuple[Row, ...]:
    """Easy rows about the tools that ``row`` offers: the examples that a model may write for it."""
    examples = []
    for number in range(COLD_OWN_EXAMPLES):
        name = rng.choice(row.tool_names)
        call = _call(name, catalogue, currency, rng)
        tools = [tool for tool in row.tools if tool["function"]["name"] == name]
        examples.append(Row(f"{row.id}-example-{number}", request([call], rng), tools, [call]))
    return tuple(examples)


def cold_start_examples(seed: int, self_exemplify: float = 0.0) -> Iterator[Example]:
    """An endless stream of supervised examples, in training order.

    First ``COLD_EASY_EXAMPLES`` of the tier easy, then a mix of all tiers (``COLD_MIX``), a share
    ``COLD_DEMONSTRATED`` of it with demonstrations, drawn as in training: from rows of all tiers, one for each offered
    tool. Without demonstrations the target has deliberate mistakes (``NOISE``) and ``COLD_CURRENCY``; with them it is
    right and has the demonstrations' currency. So the model learns to copy and to follow demonstrations, and keeps
    mistakes that reinforcement learning can correct. From ``COLD_OWN_EXAMPLES_AFTER`` on, a share ``self_exemplify``
    has examples to write before the answer, which has the mistakes too.
    """
    rng = random.Random(f"cold start {seed}")
    for index in itertools.count():
        catalogue = _Catalogue(held_out=False, edition=rng.randint(1, COLD_EDITIONS))
        easy = index < COLD_EASY_EXAMPLES
        tier = "easy" if easy else rng.choices(list(COLD_MIX), list(COLD_MIX.values()))[0]
        if self_exemplify and index >= COLD_OWN_EXAMPLES_AFTER and rng.random() < self_exemplify:
            row = _row(tier, f"cold-{index}", catalogue, COLD_CURRENCY, rng)
            yield Example(row, (), imitated(row.answer, rng), _own_examples(row, catalogue, COLD_CURRENCY, rng))
        elif easy or rng.random() >= COLD_DEMONSTRATED:
            row = _row(tier, f"cold-{index}", catalogue, COLD_CURRENCY, rng)
            yield Example(row, (), imitated(row.answer, rng))
        else:
            (tier,) = rng.choices(list(COLD_SHOWN_MIX), list(COLD_SHOWN_MIX.values()))
            currency = rng.choice(CURRENCIES)
            row = _row(tier, f"cold-{index}", catalogue, currency, rng)
            solved = [_user(name, f"{row.id}-{name}", catalogue, currency, rng) for name in row.tool_names]
            shown = tuple(DemonstrationIndex(solved).choose(row, rng))
            called = {call["name"] for other in shown for call in other.answer}
            if tier != "convention" or row.answer[0]["name"] in called:
                yield Example(row, shown, row.answer)
