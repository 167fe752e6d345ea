"""Remedies for dead groups (retries, demonstrations, hints), tested with a scripted sampler."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from tests.train.scripted import CHATTER, PLACES, SHARES, scripted_trainer
from tests.train.test_trainer import make_trainer, training_rows
from toolx_kernels.rollout.prompts import Prompts
from toolx_kernels.toolcall.chat import Chat
from toolx_kernels.toolcall.template import MARK
from toolx_kernels.train.groups import RAW
from toolx_kernels.train.policies.advantages import give_advantages
from toolx_kernels.train.task import solved_by_default

G = 4
ALL_AT_ONCE = dict(prompts_per_step=12, num_train_epochs=1, num_generations=G)
EPOCHS = dict(num_train_epochs=4)


# ---- retries


def script(row, help, index):
    """Without help, four of twelve rows are dead, four live and four solved.

    Demonstrations, or hints of at least half the answer, make every other dead row live.
    """
    kind = PLACES[row.id] % 3
    if kind:
        return kind == 2 or index % 2 == 0
    helps = help == "demonstrations" or (help != "raw" and help >= 0.5)
    return PLACES[row.id] % 6 == 0 and helps and index % 2 == 1


DEAD = {place for place in range(12) if place % 3 == 0}
LIVE = {place for place in range(12) if place % 3 == 1}
REVIVED = {place for place in range(12) if place % 6 == 0}


def shaped(trainer):
    """The groups of a step, as the learner gets them."""
    groups, sampled = trainer.rounds.next_groups()
    assert groups == sampled
    groups = trainer.group_selector(groups)
    give_advantages(groups, trainer.advantage_shaper)
    return groups


def gradients(trainer, groups, denominator):
    """Each group's part of the step's gradient, by prompt."""
    learner, found = trainer.learner, {}
    learner.args = replace(trainer.args, denominator=denominator)
    learner._cut = lambda groups: [[group] for group in groups]
    learner._apply = lambda results, number: 0.0
    backward = type(learner)._backward

    def alone(part, loss_of):
        told = backward(learner, part, loss_of)
        found[tuple(part[0].prompt)] = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
        trainer.model.zero_grad(set_to_none=False)
        return told

    learner._backward = alone
    learner.improve(groups, 0)
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """By loss type: the groups of a plain GRPO step, and the gradient of each group."""

    def of(loss_type):
        folder = tmp_path_factory.mktemp("plain")
        trainer = scripted_trainer(folder, script, hard_sampling="none", loss_type=loss_type, **ALL_AT_ONCE)
        groups = shaped(trainer)
        return groups, {denominator: gradients(trainer, groups, denominator) for denominator in ("all", "live")}

    return {loss_type: of(loss_type) for loss_type in ("grpo", "dapo")}


def what(rollouts):
    return [(rollout.ids, rollout.text) for rollout in rollouts]


def numbers(advantages):
    """The set of advantages of each rollout, whether given per rollout or per token."""
    return [set(each) if isinstance(each, list) else {each} for each in advantages]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_type": "dapo"},
        {"retry_learns": "shown"},
        {"retry_with": "hint"},
        {"retry_with": "hint", "retry_learns": "shown"},
        {"advantage_shaping": "successes"},
        {"advantage_shaping": "routed"},
    ],
    ids=str,
)
def test_retries_touch_dead_groups_alone(plain, tmp_path, settings):
    of_plain, gradients_of_plain = plain[settings.get("loss_type", "grpo")]
    trainer = scripted_trainer(tmp_path / "run", script, hard_sampling="retry", **ALL_AT_ONCE, **settings)
    groups = shaped(trainer)
    hints, shown = settings.get("retry_with") == "hint", settings.get("retry_learns") == "shown"

    first, *again = trainer.rollouter.asked
    rows_asked = [{PLACES[row.id] for row in rows} for _, rows, _ in again]
    assert rows_asked == ([DEAD, DEAD, DEAD - REVIVED] if hints else [DEAD]), "a hint grows until a rollout is solved"
    assert [len(rows) for _, rows, _ in again] == [len(rows) for rows in rows_asked]
    for number, (_, rows, prompts) in enumerate(again):
        helps = {trainer.rollouter.help_of(*of) for of in zip(rows, prompts, strict=True)}
        assert helps == ({SHARES[number]} if hints else {"demonstrations"})

    further = groups[12:]
    assert {group.plan.row for group in further} == (REVIVED if shown else set())
    for mine, theirs in zip(groups[:12], of_plain, strict=True):
        row = mine.plan.row
        assert mine.plan == theirs.plan and mine.prompt == theirs.prompt
        assert what(mine.rollouts[:G]) == what(theirs.rollouts) and mine.rewards[:G] == theirs.rewards
        assert (mine.tries, mine.revived) == (
            (0, False) if row not in DEAD else ((2 if row in REVIVED else 3) if hints else 1, row in REVIVED)
        )
        if row in REVIVED and not shown:
            assert mine.retried == [False] * G + [True] * G and mine.shown[0] == RAW != mine.shown[-1]
            assert mine.rewards == [0.0] * G + [0.0, 1.0, 0.0, 1.0] and len(mine.advantages) == 2 * G
        else:
            assert numbers(mine.advantages) == numbers(theirs.advantages) and len(mine.rollouts) == G
    for group in further:
        assert group.prompt == trainer.task.prompts.ids(trainer.task.rows[group.plan.row], *group.shown[0])
        assert group.on_policy_prompt == [True] * G and group.rewards == [0.0, 1.0, 0.0, 1.0]

    learned_on = {tuple(group.prompt) for group in (further if shown else groups) if group.plan.row in REVIVED}
    of_live = {tuple(group.prompt) for group in of_plain if group.plan.row in LIVE}
    with_gradient = [group for group in of_plain if group.plan.row in LIVE]
    for denominator in ("all", "live"):
        mine, theirs = gradients(trainer, groups, denominator), gradients_of_plain[denominator]
        assert mine.keys() == of_live | learned_on and theirs.keys() == of_live
        scale = 1.0
        if denominator == "live":  # a revived group adds G draws: those of the retry's group or of the retried one

            def size(group):
                return sum(len(r.ids) for r in group.rollouts[:G]) if "loss_type" in settings else G

            before = sum(map(size, with_gradient))
            more = further if shown else [group for group in groups if group.plan.row in REVIVED]
            scale = before / (before + sum(map(size, more)))
            assert scale < 1
        for prompt in of_live:
            assert float(theirs[prompt].abs().max()) > 1e-3
            torch.testing.assert_close(mine[prompt], scale * theirs[prompt], rtol=0, atol=1e-6)


def test_first_draws_of_the_engine_are_those_of_grpo(tmp_path):
    """With a real model: a retry draws from another stream and leaves the first draws unchanged to the bit."""

    def of(name, **settings):
        return shaped(make_trainer(tmp_path / name, cold_start_steps=0, **settings))

    plain = of("none", hard_sampling="none")
    best = [max(group.rewards) for group in plain]
    solved = sorted(best)[len(best) // 2]
    dead = [place for place, reward in enumerate(best) if reward < solved]
    assert dead
    retried = of("retry", hard_sampling="retry", solved_reward=solved)
    for place, (mine, theirs) in enumerate(zip(retried, plain, strict=True)):
        assert [(r.ids, r.logprobs) for r in mine.rollouts[:G]] == [(r.ids, r.logprobs) for r in theirs.rollouts]
        assert mine.tries == (place in dead)
        assert mine.advantages == theirs.advantages or mine.revived


# ---- demonstrations of hard rows


@pytest.mark.parametrize("form", ["replace", "add"])
def test_hard_rows_show_demonstrations_and_fewer_once_these_always_work(tmp_path, form):
    """Even rows are hard; with demonstrations, half of them are always right and half never."""

    def right(row, help, index):
        return bool(PLACES[row.id] % 2) or (help != "raw" and PLACES[row.id] % 4 == 0)

    settings = dict(
        hard_sampling=form, epochs_per_round=4, num_train_epochs=8, few_shots_per_tool=2, prompts_per_step=12
    )
    trainer = scripted_trainer(tmp_path / "run", right, **settings)
    rounds = trainer.rounds
    found = rounds.begin_round()
    assert found.hard == [place for place in range(12) if place % 2 == 0]
    shown = {row: rounds.table.demonstrations(row) for row in range(12)}
    assert {row for row in shown if shown[row]} == {
        row for row in found.hard if trainer.task.demonstrations.possible(trainer.task.rows[row])
    }
    always = [row for row in shown if shown[row] and row % 4 == 0]
    assert 2 in {len(shown[row]) for row in always} and any(shown[row] and row % 4 for row in shown)
    for visit in range(4):
        groups, _ = rounds.next_groups()
        by_row = {row: [group for group in groups if group.plan.row == row] for row in range(12)}
        for row in range(12):
            left = shown[row][: max(0, len(shown[row]) - visit)] if row in always else shown[row]
            plans = [group.plan.scored_with.demonstrations for group in by_row[row]]
            assert plans == ([left] if not left or form == "replace" else [(), left]), (visit, row)
    assert rounds.begin_round().hard == found.hard and rounds.next_round == 1
    assert rounds.table.counters(1)["only_shown"] == len(always)
    assert [rounds.table.states[row].only_shown for row in found.hard] == [
        [0] if row in always else [] for row in found.hard
    ]
    assert all(bool(rounds.table.demonstrations(row)) == bool(shown[row]) for row in range(12)), "drawn anew"


def test_demonstrations_of_retries_are_drawn_anew_at_each_visit_and_repeat_after_a_resume(tmp_path):
    def drawn(visits, state=None):
        folder = tmp_path / "run"  # nothing is written
        trainer = scripted_trainer(folder, lambda *_: False, hard_sampling="retry", **ALL_AT_ONCE | EPOCHS)
        if state:
            trainer.rounds.load_state_dict(state)
            trainer.collector.load_state_dict(state["collector"])
        prompts = []
        for _ in range(visits):
            trainer.rounds.next_groups()
            _, rows, of_visit = trainer.rollouter.asked[-1]
            prompts.append({row.id: prompt for row, prompt in zip(rows, of_visit, strict=True)})
        streams = [stream for stream, *_ in trainer.rollouter.asked]
        assert len(set(streams)) == 2 * visits and all(2**30 <= stream < 2**31 for stream in streams[1::2])
        return prompts, trainer.rounds.state_dict() | {"collector": trainer.collector.state_dict()}

    whole, _ = drawn(3)
    first, state = drawn(1)
    second, state = drawn(1, state)
    third, _ = drawn(1, state)
    assert first + second + third == whole and len(whole[0]) == 12
    assert sum(whole[0][row] != whole[1][row] != whole[2][row] for row in PLACES) > 3


# ---- hints


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("prompts"), cold_start_steps=0).task.prompts


def told(prompts, row, share):
    text = prompts.hint(row, share)
    assert text.startswith("The answer begins: ")
    return text.removeprefix("The answer begins: ").replace(MARK, "")


def test_a_hint_tells_the_first_tokens_of_the_answer_and_no_more(prompts):
    for row in training_rows():
        answer = prompts.chat.completion_ids(row.answer)[:-1]
        whole = prompts.chat.tool_format.render(row.answer)
        for share in SHARES:
            beginning = told(prompts, row, share)
            assert whole.startswith(beginning) and beginning != whole
            assert len(prompts.chat.template.encode(beginning)) == math.ceil(share * len(answer))
            raw, hinted = prompts.ids(row), prompts.ids(row, (), prompts.hint(row, share))
            assert beginning in prompts.chat.tokenizer.decode(hinted) and hinted != raw
            assert prompts.chat.tokenizer.decode(hinted).count(row.user_text) == 1
            assert whole not in prompts.chat.tokenizer.decode(hinted)


@pytest.mark.parametrize("tokens", [[], ["<tool_call>", "</tool_call>"]], ids=["text", "tokens"])
@pytest.mark.parametrize("text", ["<|im_end|> <|im_start|>system", "<tool_call> </tool_call>", "žluť 東京 🙂"])
def test_what_an_argument_spells_stays_data_in_a_hint(prompts, text, tokens):
    """Also where the tags of calls are single tokens; and no hint ends inside a character."""
    tokenizer = copy.deepcopy(prompts.chat.tokenizer)
    tokenizer.add_tokens(tokens)
    prompts = Prompts(Chat(tokenizer), prompts.context)
    control = tokenizer.added_tokens_decoder.keys()
    row = training_rows()[0]
    (call,) = row.answer
    name = next(iter(call["arguments"]))
    spelt = replace(row, answer=[{**call, "arguments": {name: f"{text} {text} {text}"}}])
    answer = prompts.chat.completion_ids(spelt.answer)[:-1]
    assert sum(i in control for i in answer) == len(tokens)
    for share in (*SHARES, 1.0):
        assert prompts.chat.tool_format.render(spelt.answer).startswith(told(prompts, spelt, share))
        hinted = prompts.ids(spelt, (), prompts.hint(spelt, share))
        of_answer = [i for i in answer[: math.ceil(share * len(answer))] if i in control]
        others = [i for i in prompts.ids(spelt, (), "The answer begins: ") if i in control]
        assert sorted(i for i in hinted if i in control) == sorted(others + of_answer)


def test_hints_without_room_are_left_out(tmp_path):
    trainer = scripted_trainer(
        tmp_path / "run", lambda *_: False, hard_sampling="retry", retry_with="hint", **ALL_AT_ONCE
    )
    prompts = trainer.task.prompts
    row = max(trainer.task.rows, key=lambda row: len(prompts.ids(row)))
    hinted = [len(prompts.ids(row, (), prompts.hint(row, share))) for share in SHARES]
    assert hinted == sorted(set(hinted))
    prompts.context = hinted[1] + 64
    assert [bool(prompts.hint(row, share, room=64)) for share in SHARES] == [True, True, False]
    prompts.context = hinted[0] + 63
    assert not prompts.hint(row, SHARES[0], room=64)
    prompts.context = len(prompts.ids(row)) + 10  # less room than requested: a hint may take none of it
    assert not prompts.hint(row, SHARES[0], room=64)
    prompts.context = hinted[1] + 64
    trainer.rounds.next_groups()
    asked = [sum(other.id == row.id for other in rows) for _, rows, _ in trainer.rollouter.asked]
    assert asked == [1, 1, 1, 0], "the first draw and two hints"


# ---- solved rollouts


def test_right_calls_beside_words_are_correct_and_not_solved(tmp_path):
    """This holds in the probe, in dead groups and in the verification of demonstrations."""

    def right(row, help, index):
        return CHATTER if PLACES[row.id] % 2 else True

    odd, even = list(range(1, 12, 2)), list(range(0, 12, 2))
    trainer = scripted_trainer(tmp_path / "run", right, hard_sampling="retry", **ALL_AT_ONCE)
    assert trainer.rounds.begin_round().hard == odd
    groups, _ = trainer.rounds.next_groups()
    assert all(all(group.correct) for group in groups)
    assert [group.plan.row for group in groups if group.dead] == sorted(odd, key=[g.plan.row for g in groups].index)
    _, first, again = [{PLACES[row.id] for row in rows} for _, rows, _ in trainer.rollouter.asked if len(rows) > 5][-3:]
    assert first == {*odd, *even} and again == set(odd), "groups that are all solved are never retried"
    better = dict(hard_sampling="replace", demonstrations="better", verification="bold", demonstration_tries=1)
    for works in (CHATTER, True):
        trainer = scripted_trainer(
            tmp_path / "run", lambda row, help, index, works=works: help != "raw" and works, **better, **ALL_AT_ONCE
        )
        trainer.rounds.begin_round()
        verified = {state.verified for state in trainer.rounds.table.states if state.tries}
        assert verified == {works is True}


def test_a_bonus_or_a_weight_solves_nothing_and_hides_nothing(tmp_path):
    class Bonus:
        """Rewards with a bonus of 0.01, as ``SelfExemplifyingReward`` pays it."""

        parts = {"self_exemplifying_reward": [1.01, 1.0, 0.01, 0.0, None]}

    assert solved_by_default(Bonus()) == [True, True, False, False, False]
    trainer = scripted_trainer(tmp_path / "run", lambda *_: True, reward_weights=[0.5], **ALL_AT_ONCE)
    assert trainer.rounds.begin_round().hard == []
    groups, _ = trainer.rounds.next_groups()
    assert all(group.rewards == [0.5] * G and all(group.solved) for group in groups)


def test_with_rewards_of_ones_own_the_total_solves(tmp_path):
    """Right calls earn .3 from one function and, in even rows only, .2 from another."""

    def first(prompts, completions, completion_ids, answer, **columns):
        return [0.3 * ("tool_call" in text) for text in completions]

    def second(prompts, completions, completion_ids, id, **columns):
        return [0.2 * (PLACES[name] % 2 == 0) for name in id]

    def hard_and_dead(solved_reward):
        trainer = scripted_trainer(
            tmp_path / "run",
            lambda row, help, index: help != "raw" or index == 1,
            [first, second],
            solved_reward=solved_reward,
            hard_sampling="retry",
            **ALL_AT_ONCE,
        )
        found = trainer.rounds.begin_round()
        groups, _ = trainer.rounds.next_groups()
        return found.hard, sorted(group.plan.row for group in groups if group.tries)

    odd = list(range(1, 12, 2))
    assert hard_and_dead(0.3) == ([], [])
    assert hard_and_dead(0.5) == (odd, odd)
    assert hard_and_dead(0.51) == (list(range(12)), list(range(12)))
    assert hard_and_dead(0.0) == ([], [])
