"""Scores on hand-made numbers, intervals against scipy, and evaluations of the tiny model."""

import json
import math
from collections import Counter
from itertools import combinations

import pytest
from scipy.stats import binomtest

from tests.ops.cases import DEVICE
from toolx_kernels.engine import RolloutEngine, SamplingParams
from toolx_kernels.errors import InputError
from toolx_kernels.evaluate.evaluate import evaluate
from toolx_kernels.evaluate.intervals import wilson
from toolx_kernels.evaluate.scores import Answer, Scores, describe, notes, pass_at_k, table, write_scores
from toolx_kernels.evaluate.tables import markdown
from toolx_kernels.files import check_new, new_folder
from toolx_kernels.models.load import load_model
from toolx_kernels.progress import ProgressBar
from toolx_kernels.rollout.prompts import Prompts
from toolx_kernels.rollout.single_turn import SingleTurn
from toolx_kernels.toolcall import read_bfcl
from toolx_kernels.toolcall.chat import Chat
from toolx_kernels.toolcall.datasets import builtin
from toolx_kernels.toolcall.rows import Row

SINGLE_TURN = {
    "simple_python": 400, "multiple": 200, "parallel": 200, "parallel_multiple": 200, "live_simple": 258,
    "live_multiple": 1053, "live_parallel": 16, "live_parallel_multiple": 24,
}  # fmt: skip


def test_single_turn_has_the_papers_2351_rows():
    pytest.importorskip("bfcl_eval")
    rows = read_bfcl("single_turn")
    assert Counter(row.columns["category"] for row in rows) == SINGLE_TURN and len(rows) == 2351
    assert len({row.id for row in rows}) == 2351
    assert rows[0] == read_bfcl("simple_python")[0] and rows[-1] == read_bfcl("live_parallel_multiple")[-1]


def test_an_unknown_category_is_answered_with_groups_and_categories():
    with pytest.raises(InputError, match="'cooking': choose one of single_turn, simple_python"):
        read_bfcl("cooking")


@pytest.mark.parametrize("right, n", [(0, 7), (1, 1), (3, 16), (320, 2351), (24, 24)])
def test_wilson_is_scipys(right, n):
    theirs = binomtest(right, n).proportion_ci(method="wilson")
    assert wilson(right / n, n)[1:] == pytest.approx(tuple(theirs), abs=1e-12)


@pytest.mark.parametrize("n, k", [(5, 1), (5, 2), (5, 5), (8, 3)])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_one(n, k):
    for c in range(n + 1):
        draws = [any(place < c for place in draw) for draw in combinations(range(n), k)]
        assert pass_at_k(n, c, k) == pytest.approx(sum(draws) / len(draws), abs=1e-15)


def row(name, **columns):
    return Row(name, "p", [], [], columns)


def answers(*right, reason="stop"):
    return [Answer("text", bool(ok), 3, reason) for ok in right]


def two_parts():
    """Three rows of part a, one of part b, one of no part; two samples each."""
    rows = [row("0", category="a"), row("1", category="a"), row("2", tier="b"), row("3", category="a"), row("4")]
    given = [answers(1, 1), answers(0, 1), answers(0, 1), answers(0, 0), answers(1, 1, reason="length")]
    return Scores(rows, given, ks=(1, 2))


def test_scores_of_parts_and_the_micro_average():
    scores = two_parts()
    assert scores.total.right == 6 and scores.accuracy == 0.6, "over items, not the mean of parts"
    assert list(scores.parts) == ["a", "b"]
    a = scores.parts["a"]
    assert (a.n, a.samples, a.right, a.accuracy.value) == (3, 2, 3, 0.5)
    assert a.pass_at[1].value == 0.5 and a.pass_at[2].value == pytest.approx(2 / 3)
    assert a.accuracy == wilson(0.5, 3), "rows are the trials, whatever the number of samples"
    assert scores.total.pass_at[2].value == 0.8 and scores.cut_off == 2


def test_parts_of_unequal_size_do_not_weigh_alike():
    rows = [row(str(i), category="big" if i < 9 else "small") for i in range(10)]
    scores = Scores(rows, [answers(i == 9) for i in range(10)])
    assert scores.accuracy == 0.1 and scores.parts["small"].accuracy.value == 1.0


def test_the_table_has_a_row_for_each_dataset_and_part():
    one = Scores([row("x", category="irrelevance")], [answers(0, 0, reason="context")], ks=(1, 2))
    cells = table({"first": two_parts(), "second|x": one})
    assert [line[0] for line in cells] == ["", "first", "  a", "  b", "second|x"], "a part that is all needs no row"
    assert cells[1][1:4] == ["5", "6/10", "0.6000"] and cells[2][-2:] == ["0.5000", "0.6667"]
    said = " ".join(notes({"first": two_parts(), "second|x": one}))
    assert "second|x: 1 of 1 prompts do not fit the model's context and count as wrong: x." in said
    assert "first: 2 completions were cut off" in said and "not averaged" in said
    assert "| second\\|x | 1 |" in markdown(cells) and "&nbsp;&nbsp;a |" in markdown(cells)
    assert "micro-average" not in " ".join(notes({"second|x": one}))


def test_files_hold_every_answer_and_come_all_at_once(tmp_path):
    scores, folder = {"rows.jsonl": two_parts()}, tmp_path / "deep" / "scores"
    with pytest.raises(RuntimeError), new_folder(folder) as beside:
        write_scores(beside, scores, {"model": "tiny"})
        raise RuntimeError("killed")
    assert [*folder.parent.iterdir()] == []
    with new_folder(folder) as beside:
        write_scores(beside, scores, {"model": "tiny", "seed": 3, "eval_rows": None})
        assert not folder.exists()
    assert sorted(path.name for path in folder.iterdir()) == ["answers.jsonl", "scores.json", "scores.md"]
    written = json.loads((folder / "scores.json").read_text())
    assert written["settings"] == {"model": "tiny", "seed": 3, "eval_rows": None}
    of_dataset = written["scores"]["rows.jsonl"]
    assert (of_dataset["n"], of_dataset["right"], of_dataset["accuracy"]) == (5, 6, 0.6)
    assert of_dataset["interval"] == pytest.approx([*wilson(0.6, 5)[1:]])
    assert of_dataset["parts"]["a"]["pass_at"]["2"]["value"] == pytest.approx(2 / 3)
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [(line["id"], line["sample"], line["right"]) for line in lines[2:4]] == [("1", 0, False), ("1", 1, True)]
    assert len(lines) == 10 and lines[4]["part"] == "b" and lines[0]["text"] == "text"
    assert "| rows.jsonl | 5 | 6/10 | 0.6000 |" in (folder / "scores.md").read_text()
    assert "seed 3" in (folder / "scores.md").read_text() and "0.6000" in describe(scores)
    with pytest.raises(InputError, match="holds files already"):
        check_new(folder)
    with pytest.raises(InputError, match="is a file"):
        check_new(folder / "scores.md")


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = load_model("tiny", device=str(DEVICE))
    prompts = Prompts(Chat(tokenizer), model.get_decoder().config.max_position_embeddings)
    return SingleTurn(RolloutEngine(model), prompts.chat), prompts


def even(text, of_row):
    return len(text) % 2 == 0


def test_greedy_answers_are_the_models_and_judged(tiny):
    rollouter, prompts = tiny
    rows = builtin.heldout_rows(8, 0)
    params = SamplingParams(max_new_tokens=6, temperature=0.0)
    scores = evaluate(rollouter, prompts, rows, params, judge=even)
    texts = [of_row[0].text for of_row in scores.answers]
    groups = rollouter.engine.generate([prompts.ids(of_row) for of_row in rows], 1, params)
    assert (
        texts == [prompts.chat.tokenizer.decode(group.completions[0].ids) for group in groups] and len(set(texts)) > 1
    )
    right = [even(text, None) for text in texts]
    assert [of_row[0].right for of_row in scores.answers] == right and 0 < sum(right) < 8
    assert scores.cut_off == sum(of_row[0].tokens == 6 for of_row in scores.answers) > 0
    assert scores.accuracy == sum(right) / 8
    assert scores.parts["hard"].accuracy.value == sum(right[1::4]) / 2 and len(scores.parts) == 4


def test_answers_are_judged_for_their_own_rows(tiny):
    rollouter, prompts = tiny
    rows, seen = builtin.heldout_rows(4, 0), []

    def judge(text, of_row):
        seen.append(of_row.id)
        return of_row.id == rows[2].id

    scores = evaluate(rollouter, prompts, rows, SamplingParams(4), n=3, ks=(1, 3), judge=judge)
    assert seen == [of_row.id for of_row in rows for _ in range(3)]
    assert scores.total.right == 3 and scores.accuracy == scores.total.pass_at[3].value == 0.25


def test_a_completion_that_ends_early_cancels_none_of_its_siblings(tiny):
    rollouter, prompts = tiny
    stops = tuple(range(0, len(prompts.chat.tokenizer), 5))  # every fifth token ends a completion
    scores = evaluate(rollouter, prompts, builtin.heldout_rows(4, 0), SamplingParams(12, stop_token_ids=stops), n=4)
    lengths = {answer.tokens for of_row in scores.answers for answer in of_row}
    assert len(lengths) > 2 and {a.finish_reason for of_row in scores.answers for a in of_row} <= {"stop", "length"}


@pytest.mark.parametrize(
    "temperature, n, ks, message",
    [
        (0.0, 5, (), "num_generations=5 greedy completions would all be the same"),
        (0.7, 0, (), "num_generations=0 must be at least 1"),
        (0.7, 4, (1, 5), "pass@5 needs a k from 1 to num_generations=4"),
        (0.7, 4, (0,), "pass@0"),
        (0.7, 4, (1, 2, 1), "pass@1 is asked for twice: name each k once."),
        (0.0, 1, (2,), "pass@2"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused(temperature, n, ks, message, tiny):
    rollouter, prompts = tiny
    with pytest.raises(InputError, match=message):
        evaluate(rollouter, prompts, [], SamplingParams(1, temperature=temperature), n=n, ks=ks)


def test_a_prompt_beyond_the_context_is_wrong_and_leaves_the_others_as_they_are(tiny):
    rollouter, prompts = tiny
    rows = builtin.heldout_rows(4, 0)
    params = SamplingParams(max_new_tokens=6, temperature=1.0)
    whole = evaluate(rollouter, prompts, rows, params, n=2, judge=lambda *_: True)
    long = Row("too long", "find the hotel " * 2000, rows[1].tools, [], {"tier": "long"})
    given = [rows[0], long, *rows[2:]]
    scores = evaluate(
        rollouter, prompts, given, params, n=2, ks=(2,), judge=lambda *_: True, bar=ProgressBar(), title="x"
    )
    assert [of_row.id for of_row in scores.too_long] == ["too long"] and scores.accuracy == 0.75
    assert scores.answers[1] == [Answer("", False, 0, "context")] * 2
    assert scores.parts["long"].pass_at[2].value == 0.0
    for place in (0, 2, 3):
        assert scores.answers[place] == whole.answers[place]
    assert whole.answers[0][0].text != whole.answers[0][1].text
    alone = evaluate(rollouter, prompts, [long], params, judge=lambda *_: True)
    assert alone.accuracy == 0 and math.isclose(alone.total.accuracy.low, 0)
