"""Runs written by hand: reading them, and the rule for a collapse."""

import json

import pytest

from tests.compare.cases import write_run
from toolx_kernels.compare.runs import ACCURACY, HARD, HARD_SHARE, Curve, Point, collapse, read_run
from toolx_kernels.errors import InputError

COLLAPSES = {
    "a steady rise": ([0.1, 0.2, 0.4, 0.5, 0.6], False),
    "to a third for good": ([0.1, 0.6, 0.2, 0.2, 0.2], True),
    "for exactly a round": ([0.1, 0.6, 0.2, 0.2, 0.55], False),
    "for a round and its end": ([0.1, 0.6, 0.2, 0.2, 0.2, 0.5], True),
    "by two standard errors": ([0.5, 0.401, 0.401, 0.401], False),
    "by a little more": ([0.5, 0.4, 0.4, 0.4], True),
    "a dip inside": ([0.1, 0.6, 0.2, 0.55, 0.2, 0.2, 0.55], False),
    "at the very end": ([0.1, 0.6, 0.55, 0.2, 0.2], False),
    "of what was best before, not after": ([0.2, 0.15, 0.15, 0.15, 0.6], False),
    "from a best of .05": ([0.05, 0.0, 0.0, 0.0], True),
    "from a best that is hardly above nothing": ([0.049, 0.0, 0.0, 0.0], False),
    "nothing to lose": ([0.0, 0.0, 0.0, 0.0], False),
}


def curve(*accuracies):
    """Evaluations every 10 steps."""
    return [Point(10 * i, 0, None, accuracy) for i, accuracy in enumerate(accuracies)]


@pytest.mark.parametrize("name", COLLAPSES)
def test_collapse(name):
    """A round of 20 steps spans three evaluations; two standard errors of .5 and .4 on 198 rows are .0995."""
    accuracies, expected = COLLAPSES[name]
    assert collapse(curve(*accuracies), round_steps=20, rows=198) is expected


def test_few_rows_tell_no_collapse():
    fall = curve(0.3, 0.6, 0.35, 0.35, 0.35)
    assert collapse(fall, 20, rows=100) is True and collapse(fall, 20, rows=20) is False


def test_collapse_without_a_curve():
    assert collapse([], 10, rows=100) is None and collapse(curve(0.5, 0.1), 10, rows=100) is None


def test_a_run_is_read(tmp_path):
    run = read_run(write_run(tmp_path / "a", seed=4))
    assert (run.seed, run.step, run.tokens, run.fe, run.seconds, run.finished) == (4, 20, 20_000, 60_000, 60.0, True)
    assert run.points(ACCURACY) == [(0, 0, 0, 0.1), (10, 10_000, 30_000, 0.3), (20, 20_000, 60_000, 0.5)]
    assert run.points(HARD)[-1] == (20, 20_000, 60_000, 20.0)
    assert run.collapsed is False


def test_the_tiers_of_a_run_are_read(tmp_path):
    """A tier may have the name of another curve."""
    tiers = {"hard": (0.0, 0.1, 0.2), "easy": (0.3, 0.4, 0.6)}
    run = read_run(write_run(tmp_path / "a", tiers=tiers))
    assert {tier: [p.value for p in run.points(Curve("accuracy", tier))] for tier in tiers} == {
        tier: [*values] for tier, values in tiers.items()
    }
    assert [point.value for point in run.points(HARD)] == [40, 30, 20]
    assert run.points(Curve("accuracy", "other")) == []


def test_the_steps_of_a_round_are_those_of_the_first(tmp_path):
    """This holds however rarely the run was probed."""
    fall = dict(accuracies=(0.1, 0.6, 0.2, 0.2, 0.58), hard=(40, 30, 40, 40, 40))
    for probes in ("each", "ends", "none"):
        run = read_run(write_run(tmp_path / f"short {probes}", probes=probes, round_steps=10, **fall))
        assert run.rounds[0] == 10 and run.collapsed is True
        run = read_run(write_run(tmp_path / f"long {probes}", probes=probes, round_steps=20, **fall))
        assert run.rounds[0] == 20 and run.collapsed is False, "it stayed down for half a round"
    assert read_run(write_run(tmp_path / "one round", round_steps=100, **fall)).collapsed is None


def test_supervised_steps_are_spent_and_in_no_round(tmp_path):
    """15 of the 25 steps before the second round are supervised, so a fall of 10 steps lasts for a round."""
    fall = dict(accuracies=(0.1, 0.2, 0.6, 0.2, 0.2, 0.58), hard=(40,) * 6, round_steps=25)
    folder = write_run(tmp_path / "a", **fall)
    assert read_run(folder).collapsed is False
    metrics = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines = [line | {"event": "sft"} if line["event"] == "step" and line["step"] <= 15 else line for line in lines]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(folder)
    assert run.rounds == {0: 10, 1: 25} and run.collapsed is True
    before = [line | {"event": "sft"} if line["event"] == "step" and line["step"] <= 21 else line for line in lines]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in before))
    assert read_run(folder).collapsed is False, "the best was met in supervised steps, which RL is not to blame for"
    (folder / "summary.json").unlink()
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines[:10]))
    run = read_run(folder)
    assert (run.step, run.tokens, run.fe) == (7, 7_000, 21_000), "still in its supervised steps"


def test_rows_that_turned_hard_again_are_added_up_over_later_probes(tmp_path):
    counts = dict(relapsed=(9, 4, 3))
    run = read_run(write_run(tmp_path / "each", **counts))
    assert (run.relapsed, len(run.later_looks)) == (7, 2), "the first probe has none before it"
    assert run.relapse_rate == 7 / (10 + 20), "of the rows solved before: 50 - 40 and 50 - 30"
    run = read_run(write_run(tmp_path / "ends", probes="ends", **counts))
    assert (run.relapsed, run.relapse_rate, len(run.later_looks)) == (3, 3 / 10, 1)
    run = read_run(write_run(tmp_path / "once", accuracies=(0.1,), hard=(40,), relapsed=(0,)))
    assert (run.relapsed, run.relapse_rate, run.later_looks) == (None, None, []), "nobody looked again"
    assert read_run(write_run(tmp_path / "none", probes="none", **counts)).relapsed is None
    assert read_run(write_run(tmp_path / "untold")).relapsed is None
    assert read_run(write_run(tmp_path / "one untold", relapsed=(0, None, 3))).relapsed is None
    run = read_run(write_run(tmp_path / "all hard", hard=(50, 50, 50), relapsed=(0, 0, 0)))
    assert (run.relapsed, run.relapse_rate) == (0, None), "there was nothing to forget"


def test_a_probe_that_no_step_led_to_tells_nothing_of_forgetting(tmp_path):
    """For example, a probe that used up the budget and ended the run: rarely solved rows turn hard by chance."""
    folder = write_run(tmp_path / "a", relapsed=(0, 4, 3))
    with open(folder / "metrics.jsonl", "a") as metrics:
        metrics.write(
            json.dumps({"event": "probe", "step": 20, "round": 3, "rows": 50, "hard": 22, "relapsed": 2}) + "\n"
        )
    run = read_run(folder)
    assert (run.relapsed, run.relapse_rate, len(run.looks), len(run.later_looks)) == (7, 7 / 30, 4, 2)


def test_a_probe_of_no_rows_is_none(tmp_path):
    """A run that consists of a cold start only has no rows to probe and records 0 of 0."""
    folder = write_run(tmp_path / "a", accuracies=(0.1,), hard=(0,), relapsed=(0,))
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"rows": 50', '"rows": 0'))
    run = read_run(folder)
    assert (run.points(HARD), run.looks) == ([], {}) and len(run.points(ACCURACY)) == 1


def test_a_partial_probe_is_no_drop_of_hard_rows(tmp_path):
    """``max_steps`` ended the run within its second round, of whose 50 rows only 10 were probed."""
    folder = write_run(tmp_path / "a", hard=(40, 8, 30), relapsed=(0, 0, 6))
    metrics = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for line in lines:
        line |= {"round_rows": 50, "rows": 10 if line["hard"] == 8 else 50} if line["event"] == "probe" else {}
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(folder)
    assert [point.value for point in run.points(HARD_SHARE)] == [0.8, 0.8, 0.6]
    assert [point.value for point in run.points(HARD)] == [40, 30]
    assert [look.rows for look in run.looks.values()] == [50, 50] and run.relapse_rate == 6 / 10


def test_a_probe_that_goes_on_with_its_round_counts_once(tmp_path):
    """It happens after a resume with more steps; the line of such a probe counts all rows of the round."""
    folder = write_run(tmp_path / "a", relapsed=(0, 4, 3))
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    last = json.loads(lines[-1])
    metrics.write_text("\n".join([*lines, json.dumps(last | {"rows": 60, "relapsed": 5})]) + "\n")
    assert (read_run(folder).relapsed, len(read_run(folder).later_looks)) == (9, 2)


def test_a_run_that_does_not_tell_its_fe_throughout_has_none(tmp_path):
    assert read_run(write_run(tmp_path / "old", fe=False)).fe is None
    for event, keeps in (("step", 3), ("probe", 0), ("eval", 0)):
        folder = write_run(tmp_path / event)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        del [line for line in lines if line["event"] == event][keeps]["spent_fe"]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        run = read_run(folder)
        assert run.fe is None and run.tokens == 20_000, event


def test_seconds_are_the_summarys(tmp_path):
    assert read_run(write_run(tmp_path / "told", seconds=12.5)).seconds == 12.5
    assert read_run(write_run(tmp_path / "untold", seconds=None)).seconds is None
    folder = write_run(tmp_path / "unfinished", finished=False)
    assert read_run(folder).seconds is None
    (folder / "summary.json").write_text('{"wall_seconds": "long"}')
    with pytest.raises(InputError, match=r"summary\.json is damaged"):
        read_run(folder)


def test_the_rows_of_an_evaluation_are_the_summarys_or_of_an_unfinished_run_the_configs(tmp_path):
    fall = dict(accuracies=(0.1, 0.6, 0.3, 0.3), hard=(40, 30, 40, 40), eval_rows=30)
    assert read_run(write_run(tmp_path / "finished", **fall)).collapsed is True
    (tmp_path / "finished" / "summary.json").write_text('{"eval_rows": 10}')
    assert read_run(tmp_path / "finished").collapsed is False, "the dataset had fewer rows than were asked for"
    assert read_run(write_run(tmp_path / "unfinished", finished=False, **fall)).collapsed is True
    assert read_run(write_run(tmp_path / "all rows", finished=False, **fall | {"eval_rows": None})).collapsed is None
    (tmp_path / "finished" / "summary.json").write_text("[]")
    with pytest.raises(InputError, match=r"summary\.json is damaged"):
        read_run(tmp_path / "finished")


def test_sampled_tokens_stand_in_for_spent_ones(tmp_path):
    run = read_run(write_run(tmp_path / "a", spent=False, fe=False))
    assert run.points(ACCURACY) == [(0, 0, None, 0.1), (10, 6_000, None, 0.3), (20, 12_000, None, 0.5)]


def test_a_run_that_is_being_written_is_read_as_far_as_it_got(tmp_path):
    folder = write_run(tmp_path / "a", finished=False)
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"event": "eval", "step": 30, "accur')
    run = read_run(folder)
    assert not run.finished and run.step == 20 and len(run.points(ACCURACY)) == 3


@pytest.mark.parametrize(
    "line",
    [
        "{oops",
        "[]",
        "3",
        '{"step": 1}',
        '{"event": "eval", "step": 3}',
        '{"event": "eval", "accuracy": 1}',
        '{"event": "probe", "step": 3, "hard": null}',
        '{"event": "eval", "step": 3, "accuracy": NaN}',
        '{"event": "step", "step": "x"}',
        '{"event": "step", "step": -1}',
        '{"event": "step", "step": 3, "spent_fe": null}',
        '{"event": "step", "step": 3, "spent_fe": Infinity}',
        '{"event": "step", "step": 3, "round": "one"}',
        '{"event": "eval", "step": 3, "accuracy": 1, "parts": {"easy": null}}',
        '{"event": "eval", "step": 3, "accuracy": 1, "parts": []}',
        '{"event": "probe", "step": 3, "hard": 3, "relapsed": "few"}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_line_is_named(tmp_path, line):
    """The damaged line follows step 3."""
    metrics = write_run(tmp_path / "a") / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    lines[6:6] = [(line if isinstance(line, bytes) else line.encode()) + b"\n"]
    metrics.write_bytes(b"".join(lines))
    with pytest.raises(InputError, match=r"a/metrics\.jsonl, line 7, is damaged"):
        read_run(tmp_path / "a")


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(InputError, match="There is no run in .*nowhere"):
        read_run(tmp_path / "nowhere")
    folder = write_run(tmp_path / "a", accuracies=(), hard=())
    with pytest.raises(InputError, match="a has no evaluation or probe"):
        read_run(folder)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match="a has no evaluation or probe"):
        read_run(folder)
    (folder / "config.yaml").write_text("- a")
    with pytest.raises(InputError, match=r"config\.yaml is damaged"):
        read_run(folder)
    (folder / "config.yaml").write_text("seed: red")
    with pytest.raises(InputError, match=r"config\.yaml has the seed 'red'"):
        read_run(folder)
