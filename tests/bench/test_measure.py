"""Measurements of models: the rules for a right answer, the arithmetic, and continuing after a stop."""

import json

import pytest

from bench.learning import measure
from bench.learning.measure import is_right_in_any_form, main, on_held_out_rows, on_training_rows
from toolx_kernels.errors import InputError
from toolx_kernels.rollout.single_turn import SingleTurn
from toolx_kernels.toolcall.rows import Row

CALL = '{"name": "area", "arguments": {"base": 2}}'
ROW = Row("r", "How large?", [{"function": {"name": "area", "parameters": {}}}], [json.loads(CALL)], {})


@pytest.mark.parametrize(
    "text",
    [
        CALL,
        f"<tool_call>\n{CALL}\n</tool_call>",
        f"```json\n{CALL}\n```",
        f"```json\n<tool_call>\n  {CALL}\n</tool_call>\n```",
        f"<tool_call>\n{CALL}",
        f"You can call it so: {CALL} Good luck!",
        f"For example {CALL[:-4]}7}}}}, so <tool_call>{CALL}</tool_call>",
    ],
)
def test_right_calls_count_in_any_form(text):
    assert is_right_in_any_form(text, ROW)


@pytest.mark.parametrize("text", [CALL.replace("2", "3"), f"{CALL}\n{CALL}", CALL[:-1], "base = 2", ""])
def test_other_calls_count_in_none(text):
    assert not is_right_in_any_form(text, ROW)


def answers(*flags, reason="stop"):
    return [{"solved": s, "right": r, "format_free": f, "finish_reason": reason} for s, r, f in flags]


NONE, FORM, MORE, ALL = (False, False, False), (False, False, True), (False, True, True), (True, True, True)


def test_hard_rows_have_no_solved_rollout_and_pass_at_1_is_a_mean_share():
    found = on_training_rows([answers(NONE, FORM, MORE), answers(ALL, ALL, NONE), answers(NONE, NONE, ALL)])
    assert found["hard"] == 1 and found["rows"] == 3 and found["rollouts"] == 3
    assert found["pass_at_1"] == {"solved": 0.3333, "right": 0.4444, "format_free": 0.5556}
    assert found["of_rows"]["format_free"] == [2, 2, 1]


def test_accuracies_have_intervals_and_parts():
    rows = [Row(str(i), "p", [], [], {"category": "multiple" if i > 1 else "simple_python"}) for i in range(4)]
    found = on_held_out_rows(rows, [answers(ALL), answers(FORM, reason="length"), answers(FORM), answers(NONE)])
    assert found["rows"] == 4 and found["cut_off"] == 1
    assert found["right"]["accuracy"] == 0.25 and found["right"]["of_rows"] == "1000"
    assert found["format_free"]["parts"] == {"simple_python": 2, "multiple": 1}
    assert found["right"]["interval"] == [0.0456, 0.6994], "Wilson's"


class Stopped(Exception):
    pass


FLAGS = "--rollouts 2 --model tiny --dataset builtin --train_rows 3 --eval_rows 3 --max_completion_length 3".split()


def test_a_measurement_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "AT_ONCE", 2)
    asked, left = [], [2]
    sample = SingleTurn.roll_out

    def counted(self, rows, prompts, n, params, **rest):
        if not left[0]:
            raise Stopped
        left[0] -= 1
        asked.append(([row.user_text for row in rows], n, params.temperature))
        return sample(self, rows, prompts, n, params, **rest)

    monkeypatch.setattr(SingleTurn, "roll_out", counted)
    output = tmp_path / "new" / "tiny.json"
    with pytest.raises(Stopped):
        main([str(output), *FLAGS])
    left[0] = 99
    main([str(output), *FLAGS])
    assert [(len(texts), n, t) for texts, n, t in asked] == [(1, 2, 1.0)] * 3 + [(2, 1, 0.0), (1, 1, 0.0)]
    assert len({text for texts, *_ in asked for text in texts}) == 6, "each row once"
    first, texts = output.read_text(), output.with_suffix(".answers.jsonl").read_text()
    assert len(texts.splitlines()) == 1 + 6 and len(asked) == 5

    output.unlink()
    main([str(output), *FLAGS])
    assert output.read_text() == first and len(asked) == 5, "nothing is sampled twice"

    undisturbed = tmp_path / "again.json"
    monkeypatch.setattr(measure, "AT_ONCE", 4)  # training rows are sampled as 2 and 1
    main([str(undisturbed), *FLAGS])
    assert undisturbed.read_text() == first and undisturbed.with_suffix(".answers.jsonl").read_text() == texts
    assert str(tmp_path) not in first + texts


def test_answers_of_another_measurement_are_refused(tmp_path, monkeypatch):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(measure, "ToolExpanderTrainer", load)
    output = tmp_path / "tiny.json"
    with pytest.raises(AssertionError):
        main([str(output), *FLAGS])
    args = measure.parse_train([*FLAGS[2:], "--output_dir", str(tmp_path / "run")])
    held = measure.measurement_of(args, 2, *measure.load_rows(args))
    output.with_suffix(".answers.jsonl").write_text(json.dumps(held | {"temperature": 0.7}) + "\n")
    with pytest.raises(InputError, match="tiny.answers.jsonl holds answers for temperature=0.7, not 1.0"):
        main([str(output), *FLAGS])
