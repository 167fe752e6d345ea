"""Runs written by hand, arms of them, and statistics on numbers that can be checked in the head."""

import json
import math

import pytest
import yaml

from toolx_kernels.cli.commands import main
from toolx_kernels.compare.plot import LINE, _spread
from toolx_kernels.compare.report import describe, figures, write_comparison
from toolx_kernels.compare.runs import Point, arms_of, collapse, paired_difference, read_run
from toolx_kernels.errors import InputError
from toolx_kernels.evaluate.intervals import mean_of


def write_run(folder, seed=0, accuracies=(0.1, 0.3, 0.5), hard=(40, 30, 20), finished=True, spent=True, **config):
    """A run with an evaluation and a probe every 10 steps; 1,000 tokens a step, of which 600 were sampled."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": seed, "output_dir": str(folder), **config}))
    lines = [{"event": "cold_start", "step": 800, "loss": 1.0}]
    for i, (accuracy, count) in enumerate(zip(accuracies, hard, strict=True)):
        tokens = {"spent_tokens": 10_000 * i} if spent else {}
        if i:
            lines += [
                {"event": "step", "step": step, "tokens": 600 * step} | ({"spent_tokens": 1000 * step} if spent else {})
                for step in range(10 * i - 9, 10 * i + 1)
            ]
        lines.append({"event": "eval", "step": 10 * i, "accuracy": accuracy, "parts": {}} | tokens)
        lines.append({"event": "probe", "step": 10 * i, "round": i, "rows": 50, "hard": count} | tokens)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        (folder / "summary.json").write_text(json.dumps({"eval_rows": config.get("eval_rows") or 480}))
    return folder


def test_the_mean_of_few_values():
    assert mean_of([]) is None and mean_of([2.0]) == (2.0, None, None)
    mean, low, high = mean_of([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2.0, 2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))
    assert mean_of([0.0, 2.0])[1:] == pytest.approx((1 - 12.706205, 1 + 12.706205)), "Student's t of one degree"
    assert mean_of([4.0, 4.0]) == (4.0, 4.0, 4.0)


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
    return [Point(10 * i, 0, accuracy) for i, accuracy in enumerate(accuracies)]


@pytest.mark.parametrize("name", COLLAPSES)
def test_collapse(name):
    """Rounds of 20 steps, which three evaluations span; two standard errors of .5 and .4 on 198 rows are .0995."""
    accuracies, expected = COLLAPSES[name]
    assert collapse(curve(*accuracies), round_steps=20, rows=198) is expected


def test_few_rows_tell_no_collapse():
    fall = curve(0.3, 0.6, 0.35, 0.35, 0.35)
    assert collapse(fall, 20, rows=100) is True and collapse(fall, 20, rows=20) is False


def test_collapse_without_a_curve():
    assert collapse([], 10, rows=100) is None and collapse(curve(0.5, 0.1), 10, rows=100) is None


def test_a_run_is_read(tmp_path):
    run = read_run(write_run(tmp_path / "a", seed=4))
    assert (run.seed, run.step, run.tokens, run.finished) == (4, 20, 20_000, True)
    assert run.curves["accuracy"] == [(0, 0, 0.1), (10, 10_000, 0.3), (20, 20_000, 0.5)]
    assert run.curves["hard"][-1] == (20, 20_000, 20.0)
    assert run.collapsed is False


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
    run = read_run(write_run(tmp_path / "a", spent=False))
    assert run.curves["accuracy"] == [(0, 0, 0.1), (10, 6_000, 0.3), (20, 12_000, 0.5)]


def test_a_run_that_is_being_written_is_read_as_far_as_it_got(tmp_path):
    folder = write_run(tmp_path / "a", finished=False)
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"event": "eval", "step": 30, "accur')
    run = read_run(folder)
    assert not run.finished and run.step == 20 and len(run.curves["accuracy"]) == 3


@pytest.mark.parametrize(
    "line",
    [
        "{oops",
        "[]",
        "3",
        '{"step": 1}',
        '{"event": "eval", "step": 1}',
        '{"event": "eval", "accuracy": 1}',
        '{"event": "probe", "step": 2, "hard": null}',
        '{"event": "eval", "step": 2, "accuracy": NaN}',
        '{"event": "step", "step": "x"}',
        '{"event": "step", "step": -1}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_line_is_named(tmp_path, line):
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
    with pytest.raises(InputError, match=r"config\.yaml names the seed 'red'"):
        read_run(folder)


def runs_of(tmp_path, *specs):
    return [read_run(write_run(tmp_path / name, **settings)) for name, settings in specs]


def test_runs_that_differ_in_the_seed_are_an_arm(tmp_path):
    runs = runs_of(
        tmp_path,
        ("grpo-seed10", dict(seed=10, hard_sampling="none", model="cold/seed10/checkpoint-0")),
        ("replace/seed3", dict(seed=3, hard_sampling="replace", model="cold/seed3/checkpoint-0", date="2026-01-31")),
        ("replace/seed1", dict(seed=1, hard_sampling="replace", model="cold/seed1/checkpoint-0", date="2026-02-01")),
        (
            "grpo-seed9",
            dict(seed=9, hard_sampling="none", model="cold/seed9/checkpoint-0", device="cuda", save_steps=7),
        ),
        ("other", dict(seed=1, hard_sampling="none", model="warm/seed1/checkpoint-0")),
    )
    arms = arms_of(runs)
    assert [(arm.name, [run.seed for run in arm.runs]) for arm in arms] == [
        ("grpo", [9, 10]), ("replace", [1, 3]), ("other", [1])
    ]  # fmt: skip
    assert [arm.name for arm in arms_of(runs, ["a", "b", "c"])] == ["a", "b", "c"]
    by_run = arms_of(runs, ["x", "y", "y", "x", "z"])
    assert [(arm.name, len(arm.runs)) for arm in by_run] == [("x", 2), ("y", 2), ("z", 1)]
    with pytest.raises(InputError, match="--names gives 2 names for 5 runs in 3 arms"):
        arms_of(runs, ["a", "b"])


def test_arms_whose_folders_do_not_tell_them_apart_are_called_by_their_paths(tmp_path):
    runs = runs_of(tmp_path, ("one/run", dict(beta=0.0)), ("two/run", dict(beta=0.1)))
    assert [arm.name for arm in arms_of(runs)] == [str(tmp_path / "one" / "run"), str(tmp_path / "two" / "run")]


def test_the_same_run_twice_is_refused(tmp_path):
    first, second = runs_of(tmp_path, ("one", {}), ("two", {}))
    with pytest.raises(InputError, match="one and .*two are both runs of .* with seed 0"):
        arms_of([first, second])
    assert len(arms_of([first, second], ["a", "b"])) == 2
    with pytest.raises(InputError, match="A run is named twice"):
        arms_of([first, read_run(tmp_path / "two" / ".." / "one")])


def two_arms(tmp_path):
    """Three seeds of each; base ends at .5 .6 .7 and 20 22 24, ours .1 .2 .3 above and 5 7 9 below; one is at work."""
    base = [
        (f"base-seed{i}", dict(seed=i, arm=0, accuracies=(0.1, 0.2, end), hard=(40, 30, left)))
        for i, end, left in ((0, 0.5, 20), (1, 0.6, 22), (2, 0.7, 24))
    ]
    ours = [
        (f"ours-seed{i}", dict(seed=i, arm=1, accuracies=(0.1, 0.2, end), hard=(40, 35, left)))
        for i, end, left in ((2, 1.0, 15), (1, 0.8, 15), (0, 0.6, 15))
    ]
    late = [("ours-seed9", dict(seed=9, arm=1, accuracies=(0.3, 0.4), hard=(40, 1), finished=False))]
    return arms_of(runs_of(tmp_path, *base, *ours, *late))


def test_differences_are_paired_by_seed(tmp_path):
    base, ours = two_arms(tmp_path)
    pairs, accuracy = paired_difference(ours, base, "accuracy")
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert pairs == 3 and accuracy == pytest.approx((0.2, 0.2 - half, 0.2 + half), abs=1e-7)
    assert paired_difference(ours, base, "hard")[1].value == pytest.approx(-7.0)
    base.runs = base.runs[1:2]
    assert paired_difference(ours, base, "accuracy") == (1, (pytest.approx(0.2), None, None))
    base.runs = []
    assert paired_difference(ours, base, "accuracy") == (0, None)


def test_means_are_over_finished_runs(tmp_path):
    base, ours = two_arms(tmp_path)
    means = ours.mean_curve("accuracy")
    assert [(point.step, point.tokens) for point in means] == [(0, 0), (10, 10_000), (20, 20_000)]
    assert means[-1].mean == mean_of([0.6, 0.8, 1.0]) and means[0].mean.value == pytest.approx(0.1)
    ours.runs = [run for run in ours.runs if not run.finished]
    assert [point.mean.value for point in ours.mean_curve("hard")] == [40, 1], "none has finished: as far as they got"


def test_the_figures_of_an_arm(tmp_path):
    base, ours = figures(two_arms(tmp_path)).values()
    assert (base.runs, base.finished, base.pairs, base.hard_difference) == (3, 3, None, None)
    assert (ours.runs, ours.finished, ours.pairs, ours.seeds) == (4, 3, 3, [0, 1, 2, 9])
    assert base.accuracy_after == mean_of([0.5, 0.6, 0.7]) and base.hard_after.value == 22
    assert ours.hard_before.value == 40 and ours.tokens.value == 20_000 and ours.collapsed == 0
    assert ours.accuracy_difference.value == pytest.approx(0.2)


def test_collapsed_runs_are_counted(tmp_path):
    falls = dict(accuracies=(0.1, 0.6, 0.1, 0.1), hard=(40, 30, 40, 40))
    stays = dict(accuracies=(0.1, 0.6, 0.6, 0.6), hard=(40, 30, 40, 40))
    arms = arms_of(runs_of(tmp_path, *((f"r-{i}", dict(seed=i) | (stays if i else falls)) for i in range(3))))
    assert figures(arms)["r"].collapsed == 1


def test_the_files_say_what_the_figures_say(tmp_path):
    arms = two_arms(tmp_path)
    folder = tmp_path / "out" / "comparison"
    write_comparison(folder, arms)
    written = json.loads((folder / "comparison.json").read_text())
    assert written["ours"]["accuracy_difference"]["value"] == pytest.approx(0.2)
    assert written["ours"]["accuracy_after"]["interval"] == pytest.approx([*mean_of([0.6, 0.8, 1.0])[1:]])
    page = (folder / "comparison.md").read_text()
    assert (
        "| ours | 3 (+1 unfinished) | 0.100 | 0.800 [" in page
        and "| ours | 3 | +0.200 [-0.048, +0.448] | -7.0 [" in page
    )
    assert "| 9 | 10, unfinished | 10,000 | 0.300 → 0.400 | 40 → 1 |" in page and "(comparison.png)" in page
    picture = (folder / "comparison.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 50_000
    assert sorted(path.name for path in folder.iterdir()) == ["comparison.json", "comparison.md", "comparison.png"]
    assert "minus base" in describe(arms)


def test_labels_keep_their_distance_and_their_order():
    for places in ([0.5] * 6, [0.98, 0.99, 0.2], [0.0, 0.01, 0.02], [0.3], [], [0.9, 0.1, 0.89, 0.5]):
        moved = _spread(places, LINE)
        by_place = sorted(zip(places, moved, strict=True))
        assert all(after[1] - before[1] >= LINE - 1e-9 for before, after in zip(by_place, by_place[1:], strict=False))
        assert all(-1e-9 <= place <= 1 + 1e-9 for place in moved)
    assert _spread([0.1, 0.5, 0.9], LINE) == [0.1, 0.5, 0.9]


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [str(write_run(tmp_path / name, seed=i)) for i, name in enumerate(("a-0", "a-1"))]
    assert main(["compare", *folders]) == 0
    out = capsys.readouterr().out
    assert "0.500 [0.500, 0.500]" in out and "runs/comparison/comparison.md" in out and "minus" not in out
    assert main(["compare", folders[0], "--names", "mine", "--output", "one"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].startswith("mine ") and (tmp_path / "one" / "comparison.png").is_file()


@pytest.mark.parametrize(
    "argv, named",
    [
        (["nowhere"], "There is no run in nowhere"),
        (["run", "run"], "A run is named twice"),
        (["run", "--names", "a", "b"], "--names gives 2 names for 1 runs"),
        (["run", "--output", "file"], "--output file is a file"),
        ([], "runs"),
    ],
)
def test_bad_flags(argv, named, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    assert main(["compare", *argv]) == 2
    assert named in capsys.readouterr().err.strip().splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"], "nothing may be written"
