"""The arithmetic of the precondition, on rows made by hand."""

from types import SimpleNamespace

import pytest
import torch

from bench.learning.precondition import Answers, Measured, counts, facts, passes, passes_over, probability
from toolx_kernels.models.tiny import tiny_model, tiny_tokenizer
from toolx_kernels.rollout.prompts import Prompts
from toolx_kernels.toolcall.chat import Chat
from toolx_kernels.toolcall.datasets import builtin_facts
from toolx_kernels.toolcall.datasets.builtin_facts import Fact

G = 2
LIVE, DEAD, RIGHT = [True, False, False], [False, False, False], [True, True, True]
OFFICE = Fact("office", "office", "B0K")


def row(tier, raw, random, better_is_hard=True, fact=None, p=0.0):
    return Measured(tier, Answers(10, [5, 5, 7], raw), Answers(20, [6, 6, 8], random), better_is_hard, fact, p)


ROWS = [
    row("easy", LIVE, DEAD),
    row("office", DEAD, LIVE, False, OFFICE, 0.001),
    row("office", DEAD, DEAD, True, OFFICE, 0.003),
    row("easy", RIGHT, RIGHT),
]


def test_hard_rows_are_those_without_a_right_rollout_among_the_probed():
    found = counts(ROWS, 3)
    assert found["hard"] == {"raw": 2, "random": 2, "better": 3} and found["rows"] == 4
    assert found["right"] == {"raw": pytest.approx(4 / 12, rel=1e-3), "random": pytest.approx(4 / 12, rel=1e-3)}
    assert found["inside"] == 1
    late = [row("easy", [False, False, True], DEAD)]
    assert counts(late, 2)["hard"]["raw"] == 1 and counts(late, 3)["hard"]["raw"] == 0


def test_a_pass_costs_prompts_completions_and_thrice_what_is_trained():
    raw, shown = 10 + 5 + 5, 20 + 6 + 6
    grpo = 4 * raw + 3 * raw
    retry = (
        grpo + 2 * shown + 3 * (raw + 6 + 6)
    )  # both dead groups are sampled again; one is then trained on, with the raw prompt
    assert passes_over(ROWS, G, 1000) == {"grpo": 1000 / grpo, "retry": 1000 / retry}
    twice = 4 * raw * (1 + 7)  # all are trained on: two updates plus the reference
    retry = twice + 2 * shown + 7 * (6 + 6)
    assert passes_over(ROWS, G, 1000, updates=2, kl=True) == {"grpo": 1000 / twice, "retry": 1000 / retry}


def test_a_fact_counts_its_own_rows():
    (found,) = facts(ROWS, G, {"grpo": 10.0, "retry": 6.0}).items()
    assert found[0] == "office" and found[1]["rows"] == 2
    assert found[1]["rollouts"] == 2 * G * 10 and found[1]["lambda"] == pytest.approx(0.002 * 40)
    assert found[1]["verified"] == pytest.approx(6 * G * 1 / 3, rel=1e-3), "of the rollouts with demonstrations a third"
    known = [*ROWS, row("office", LIVE, RIGHT, False, OFFICE, 0.001)]
    again = facts(known, G, {"grpo": 10.0, "retry": 6.0})["office"]
    assert again["rows"] == 3 and again["verified"] == found[1]["verified"], "a live group is not sampled again"


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        ({}, True),
        ({"lambda": 0.11}, False),
        ({"verified": 199}, False),
        ({"random": 136}, False),
    ],
)
def test_all_three_criteria_decide(change, passed):
    narrow = {"lambda": 0.09, "verified": 200} | change
    everything = {"rows": 100, "hard": {"raw": 150, "random": 135} | change}
    listed = {"lambda": 50, "verified": 300}
    assert passes(everything, {"office": narrow, "convention": listed}) is passed
    assert passes({"rows": 100, "hard": {"raw": 50, "random": 35}}, {}), "a dataset without facts"


def test_the_probability_is_that_of_the_code_in_its_place():
    tokenizer = tiny_tokenizer()
    model, prompts = tiny_model(tokenizer, 0), Prompts(Chat(tokenizer), 1024)
    trainer = SimpleNamespace(
        model=model, tokenizer=tokenizer, args=SimpleNamespace(temperature=0.5), task=SimpleNamespace(prompts=prompts)
    )
    for each in builtin_facts.train_rows(6, 0, ("office", "account")):
        fact = builtin_facts.fact_of(each)
        code = tokenizer.convert_tokens_to_ids(fact.value)
        ids = prompts.ids(each) + prompts.chat.completion_ids(each.answer)
        assert ids.count(code) == 1
        with torch.no_grad():
            expected = torch.softmax(2 * model(torch.tensor([ids])).logits[0, ids.index(code) - 1], -1)[code]
        assert probability(trainer, each, fact) == pytest.approx(float(expected), rel=1e-4)
