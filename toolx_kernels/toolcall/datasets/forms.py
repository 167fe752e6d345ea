"""Forms of rows: recognized by their fields, converted to ours, and reported."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolx_kernels.errors import InputError, short
from toolx_kernels.toolcall.datasets.conversations import (
    Converted,
    from_openai,
    from_sharegpt,
    from_trl,
)
from toolx_kernels.toolcall.datasets.offered import LeftOutError
from toolx_kernels.toolcall.datasets.queries import from_query, is_query
from toolx_kernels.toolcall.datasets.toolace import from_toolace
from toolx_kernels.toolcall.datasets.type_names import unread_types_told
from toolx_kernels.toolcall.rows import Row, check_numbered
from toolx_kernels.toolcall.strict_json import MAX_DEPTH, is_shallow

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Form:
    """A form of rows.

    name, fields  of the form, as messages describe it
    fits          whether a row has the fields of the form
    convert       a row and its place to ours; raises InputError and LeftOutError
    """

    name: str
    fields: str
    fits: Callable[[Mapping], bool]
    convert: Callable[[Mapping, str], Converted]

    def __str__(self) -> str:
        return f"{self.name} ({self.fields})"


def _having(*fields: str) -> Callable[[Mapping], bool]:
    return lambda raw: all(field in raw for field in fields)


def _is_toolace(raw: Mapping) -> bool:
    return "tools" not in raw and _having("system", "conversations")(raw) and "<tools>" not in str(raw["system"])


def _is_ours(raw: Mapping) -> bool:
    """A prompt alone counts as ours, so that messages say what it lacks."""
    return "prompt" in raw and ("answer" in raw or not raw.keys() & {"completion", "messages", "conversations"})


OURS = Form("toolx", "prompt, tools, answer", _is_ours, lambda raw, _: Converted(dict(raw)))
FORMS = (  # a row has the first one that it fits
    OURS,
    Form("TRL", "prompt, completion, tools", _having("prompt", "completion"), from_trl),
    Form("OpenAI", "messages, tools", _having("messages"), from_openai),
    Form("ToolACE", "system, conversations", _is_toolace, from_toolace),
    Form("Hermes or ShareGPT", "conversations, tools", _having("conversations"), from_sharegpt),
    Form("xLAM", "query, tools, answers", is_query, lambda raw, place: Converted(from_query(raw, place))),
)


def form_of(raw: Mapping) -> Form | None:
    """The first of ``FORMS`` that a row fits, or None."""
    return next((form for form in FORMS if form.fits(raw)), None)


def read_rows(numbered: Sequence[tuple[int, Any]], where: str, split: str = "") -> list[Row]:
    """Reads numbered rows, all of the form of the first one; a ``Row`` passes unchanged. Logs the form, and how many
    rows were left out or cut, and why.

    Raises InputError for an empty dataset, rows of an unknown or another form, and a row that its form does not allow;
    names the row and the form.
    """
    first = next((pair for pair in numbered if not isinstance(pair[1], Row)), None)
    if first is None:
        return check_numbered(numbered, where)
    form = _form_of_all(first[1], f"{where}:{first[0]}")
    left_out: Counter[str] = Counter()
    rows: list[tuple[int, Mapping | Row]] = []
    cut = 0
    try:
        with unread_types_told(where):
            for number, raw in numbered:
                place = f"{where}:{number}"
                try:
                    row, was_cut = Converted(raw) if isinstance(raw, Row) else _converted(raw, form, place)
                except LeftOutError as reason:
                    left_out[str(reason)] += 1
                    continue
                rows.append((number, row))
                cut += was_cut
        name = f"{where}, split {split}" if split else where
        count = f"{len(rows):,} {'row' if len(rows) == 1 else 'rows'}"
        line = f"{name}: {count} in the form of {form}{_omitted(left_out, cut)}"
        if not rows:
            raise InputError(f"{where} holds no rows that can be used ({line}): give a dataset with at least one.")
        checked = check_numbered(rows, where)
    except InputError as error:
        raise InputError(f"{str(error).removesuffix('.')} ({where} is read as {form.name}: {form.fields}).") from error
    _log.log(logging.INFO if form is OURS else logging.WARNING, line)
    return checked


def _form_of_all(first: Any, place: str) -> Form:
    _check_object(first, place)
    form = form_of(_given(first)) or form_of(first)
    if form is None:
        raise InputError(
            f"{place} has the fields {', '.join(map(str, first)) or '(none)'}, which are no known form: give one of"
            f" {', '.join(map(str, FORMS))}."
        )
    return form


def _converted(raw: Any, form: Form, place: str) -> Converted:
    _check_object(raw, place)
    given = _given(raw)
    if not form.fits(given) and (other := form_of(given)):
        raise InputError(f"{place} is in another form, {other}: give each form of rows a dataset of its own.")
    if form is not OURS and not is_shallow(given):
        raise InputError(f"{place} is nested deeper than {MAX_DEPTH} levels: leave the row out.")
    return form.convert(raw, place)


def _check_object(raw: Any, place: str) -> None:
    if not isinstance(raw, Mapping):
        raise InputError(f"{place}: a row must be an object, not {short(raw)}.")


def _given(raw: Mapping) -> dict:
    return {key: value for key, value in raw.items() if value is not None}


def _omitted(left_out: Counter[str], cut: int) -> str:
    reasons = [f"{count:,} with {reason}" for reason, count in left_out.items()]
    if len(reasons) == 1:
        reasons = list(left_out)
    said = f"; {left_out.total():,} left out: {', '.join(reasons)}" if reasons else ""
    return said + (f"; {cut:,} cut after the answer" if cut else "")
