"""Arms of runs, and their statistics on numbers that can be checked by hand."""

import math

import pytest

from tests.compare.cases import runs_of, two_arms
from toolx_kernels.compare.arms import arms_of, paired_difference, tiers_of
from toolx_kernels.compare.figures import figures
from toolx_kernels.compare.runs import ACCURACY, HARD, read_run
from toolx_kernels.errors import InputError
from toolx_kernels.evaluate.intervals import mean_of


def test_the_mean_of_few_values():
    assert mean_of([]) is None and mean_of([2.0]) == (2.0, None, None)
    mean, low, high = mean_of([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2.0, 2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))
    assert mean_of([0.0, 2.0])[1:] == pytest.approx((1 - 12.706205, 1 + 12.706205)), "Student's t of one degree"
    assert mean_of([4.0, 4.0]) == (4.0, 4.0, 4.0)


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


def test_a_number_that_is_no_seed_stays_in_an_arms_name(tmp_path):
    runs = runs_of(tmp_path, ("retry20", dict(seed=0, beta=0.0)), ("grpo-2", dict(seed=2, beta=0.1)))
    assert [arm.name for arm in arms_of(runs)] == ["retry20", "grpo"]


def test_arms_whose_folders_do_not_tell_them_apart_are_called_by_their_paths(tmp_path):
    runs = runs_of(tmp_path, ("one/run", dict(beta=0.0)), ("two/run", dict(beta=0.1)))
    assert [arm.name for arm in arms_of(runs)] == [str(tmp_path / "one" / "run"), str(tmp_path / "two" / "run")]


def test_the_same_run_twice_is_refused(tmp_path):
    first, second = runs_of(tmp_path, ("one", {}), ("two", {}))
    with pytest.raises(InputError, match="one and .*two are both runs of .* with seed 0"):
        arms_of([first, second])
    assert len(arms_of([first, second], ["a", "b"])) == 2
    with pytest.raises(InputError, match="A run is given twice"):
        arms_of([first, read_run(tmp_path / "two" / ".." / "one")])


def test_differences_are_paired_by_seed(tmp_path):
    base, ours = two_arms(tmp_path)
    pairs, accuracy = paired_difference(ours.ends(ACCURACY), base.ends(ACCURACY))
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert pairs == 3 and accuracy == pytest.approx((0.2, 0.2 - half, 0.2 + half), abs=1e-7)
    assert paired_difference(ours.ends(HARD), base.ends(HARD)).mean.value == pytest.approx(-7.0)
    base.runs = base.runs[1:2]
    assert paired_difference(ours.ends(ACCURACY), base.ends(ACCURACY)) == (1, (pytest.approx(0.2), None, None))
    base.runs = []
    assert paired_difference(ours.ends(ACCURACY), base.ends(ACCURACY)) == (0, None)


def test_runs_are_averaged_at_equal_cost(tmp_path):
    """Curves are interpolated: at 15,000 FE the second run has .2, halfway between .1 and .3.

    Where the second run ends, the first has .7.
    """
    specs = [
        ("a-seed0", dict(accuracies=(0.1, 0.6, 0.7, 0.8), hard=(40, 30, 20, 10), probes="ends")),
        ("a-seed1", dict(seed=1, accuracies=(0.1, 0.3, 0.5), hard=(50, 30, 20), probes="ends")),
    ]
    (arm,) = arms_of(runs_of(tmp_path, *specs))
    second = arm.runs[1]
    second.curves[ACCURACY] = [point._replace(fe=2 * point.fe // 3) for point in second.curves[ACCURACY]]
    expected = [
        (0, 0.1),
        (20_000, (0.1 + 0.5 * 2 / 3 + 0.3) / 2),
        (30_000, (0.6 + 0.4) / 2),
        (40_000, (0.6333333 + 0.5) / 2),
    ]
    for point, (x, y) in zip(arm.mean_curve(ACCURACY, "fe"), expected, strict=True):
        assert point == (x, pytest.approx(y, abs=1e-6))
    second.curves[ACCURACY] = second.curves[ACCURACY][1:]
    assert [x for x, _ in arm.mean_curve(ACCURACY, "fe")] == [20_000, 30_000, 40_000], "from where both have begun"
    ends = arm.mean_curve(HARD, "tokens")
    assert ends == [(0, 45), (20_000, pytest.approx((20 + 20) / 2))], "40 to 10 in 30,000 tokens, 50 to 20 in 20,000"


def test_means_are_over_finished_runs(tmp_path):
    base, ours = two_arms(tmp_path)
    means = ours.mean_curve(ACCURACY, "tokens")
    assert [x for x, _ in means] == [0, 10_000, 20_000]
    assert means[-1][1] == pytest.approx((0.6 + 0.8 + 1.0) / 3) and means[0][1] == pytest.approx(0.1)
    ours.runs = [run for run in ours.runs if not run.finished]
    assert ours.mean_curve(HARD, "fe") == [(0, 40), (30_000, 1)], "none has finished: as far as they got"
    (ours.runs[0].curves).clear()
    assert ours.mean_curve(HARD, "fe") == []


def test_the_figures_of_an_arm(tmp_path):
    base, ours = figures(two_arms(tmp_path)).values()
    assert (base.runs, base.finished, base.hard.difference) == (3, 3, None)
    assert (ours.runs, ours.finished, ours.accuracy.difference.pairs, ours.seeds) == (4, 3, 3, [0, 1, 2, 9])
    assert base.accuracy.after == mean_of([0.5, 0.6, 0.7]) and base.hard.after.value == 22
    assert ours.hard.before.value == 40 and ours.collapsed == 0
    assert (ours.fe.value, ours.tokens.value, ours.seconds.value) == (60_000, 20_000, 60)
    assert ours.accuracy.difference.mean.value == pytest.approx(0.2)


def test_forgetting_is_compared_by_seed(tmp_path):
    """Base forgets 6, 7 and 8 of the 10 + 20 rows that it had solved, ours forgets 5 of 10 + 15."""
    base, ours = figures(two_arms(tmp_path)).values()
    half = 4.302653 / math.sqrt(3)
    assert base.relapsed == pytest.approx((7, 7 - half, 7 + half)) and ours.relapsed == (5, 5, 5)
    rates = (7 / 30, (7 - half) / 30, (7 + half) / 30)
    assert base.relapse_rate == pytest.approx(rates) and ours.relapse_rate.value == pytest.approx(0.2)
    assert (base.relapse_rate_difference, ours.relapse_rate_difference.pairs) == (None, 3)
    assert ours.relapse_rate_difference.mean == pytest.approx((-1 / 30, (-1 - half) / 30, (-1 + half) / 30))
    assert base.looks.value == ours.looks.value == 2


def test_tiers_are_compared_by_the_seeds_that_both_arms_measured(tmp_path):
    """On easy, ours is .3, .4 and .5 above; on office, where base lacks seed 0, it is .1 below."""
    arms = two_arms(tmp_path)
    base, ours = figures(arms).values()
    assert tiers_of(arms) == [*base.tiers] == ["easy", "office"]
    half = 4.302653 * 0.1 / math.sqrt(3)
    easy, office = ours.tiers.values()
    assert easy.before == pytest.approx((0.2, 0.2, 0.2)) and easy.after == pytest.approx((0.8, 0.8 - half, 0.8 + half))
    assert easy.difference.pairs == 3
    assert easy.difference.mean == pytest.approx((0.4, 0.4 - half, 0.4 + half))
    assert office.difference == (2, pytest.approx((-0.1, -0.1, -0.1)))
    assert base.tiers["office"].after == pytest.approx((0.3, 0.3, 0.3)) and base.tiers["office"].difference is None
    base_alone, ours_with_seed_0 = arms
    base_alone.runs, ours_with_seed_0.runs = arms[0].runs[1:], arms[1].runs[:2]
    office = figures(arms)["ours"].tiers["office"]
    assert office.difference == (1, (pytest.approx(-0.1), None, None)), "seed 1 alone is in both"


def test_one_tier_is_all_rows(tmp_path):
    tiers = {"easy": (0.1, 0.3, 0.5)}
    arms = arms_of(runs_of(tmp_path, ("a", dict(tiers=tiers)), ("b", dict(beta=1, tiers=tiers))))
    assert tiers_of(arms) == [] and figures(arms)["a"].tiers == {}


def test_what_older_runs_do_not_tell_is_none(tmp_path):
    """Older runs record no FE, seconds, rounds, forgetting or tiers; there is no difference to a run that does."""
    old = ("old", dict(arm=0, fe=False, seconds=None, probes="none", round_steps=100))
    new = ("new", dict(arm=1, relapsed=(0, 1, 2), tiers={"easy": (0, 0, 0), "hard": (0, 0, 1)}))
    of_old, of_new = figures(arms_of(runs_of(tmp_path, old, new))).values()
    absent = (of_old.fe, of_old.seconds, of_old.collapsed, of_old.relapse_rate, of_old.hard.before, of_old.hard.after)
    assert absent == (None,) * 6 and of_old.tiers["easy"].after is None
    assert of_new.relapsed.value == 3 and of_new.relapse_rate_difference == of_new.hard.difference == (0, None)
    assert of_new.tiers["hard"].difference == (0, None)


def test_collapsed_runs_are_counted(tmp_path):
    falls = dict(accuracies=(0.1, 0.6, 0.1, 0.1), hard=(40, 30, 40, 40))
    stays = dict(accuracies=(0.1, 0.6, 0.6, 0.6), hard=(40, 30, 40, 40))
    arms = arms_of(runs_of(tmp_path, *((f"r-{i}", dict(seed=i) | (stays if i else falls)) for i in range(3))))
    assert figures(arms)["r"].collapsed == 1
