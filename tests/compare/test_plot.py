"""The comparison plot: contents of its panels, read from matplotlib's objects."""

import itertools

import pytest
from matplotlib import rc_context
from matplotlib.text import Text

from tests.compare.cases import runs_of, two_arms
from toolx_kernels.compare import plot
from toolx_kernels.compare.arms import arms_of
from toolx_kernels.compare.plot import AXES, MOST_RUNS, comparison_figure
from toolx_kernels.compare.runs import ACCURACY
from toolx_kernels.pictures import COLORS, STYLE


@pytest.fixture(autouse=True)
def _style():
    with rc_context(STYLE):
        yield


@pytest.fixture
def no_labels(monkeypatch):
    """Labels make most of the time that a figure takes."""
    monkeypatch.setattr(plot, "label_ends", lambda figure, ends: None)


def panels(part):
    """The visible panels, by their titles."""
    return {panel.get_title("left").replace("\n", ""): panel for panel in part.axes if panel.get_visible()}


def labels(panel):
    return [text.get_text() for text in panel.texts]


def means(panel):
    return [line for line in panel.lines if line.get_linewidth() == 2]


def test_the_picture_has_a_panel_for_accuracy_for_hard_rows_and_for_each_tier(tmp_path):
    (part,) = comparison_figure(two_arms(tmp_path)).subfigs
    assert [*panels(part)] == ["evaluation accuracy", "share of hard rows", "tier easy", "tier office"]
    assert "unfinished" in part.get_suptitle() and "not measured" not in part.get_suptitle()


def test_a_tier_that_is_all_rows_has_no_panel(tmp_path, no_labels):
    (part,) = comparison_figure(arms_of(runs_of(tmp_path, ("a", dict(tiers={"all": (0.1, 0.3, 0.5)}))))).subfigs
    assert len(panels(part)) == 2 and part.get_suptitle() == ""


def test_a_thick_line_is_the_mean_and_a_thin_one_a_run(tmp_path, no_labels):
    base, ours = arms = two_arms(tmp_path)
    panel = panels(comparison_figure(arms))["evaluation accuracy"]
    for arm, color in ((base, COLORS[0]), (ours, COLORS[1])):
        lines = [line for line in panel.lines if line.get_color() == color]
        (mean,) = (line for line in lines if line.get_linewidth() == 2)
        assert [*map(tuple, mean.get_xydata())] == arm.mean_curve(ACCURACY, "fe")
        runs = [[*map(tuple, line.get_xydata())] for line in lines if line is not mean]
        assert runs == [[(point.fe, point.value) for point in run.points(ACCURACY)] for run in arm.runs]
        assert sum(line.get_linestyle() == ":" for line in lines) == (arm is ours), "the one at work is dotted"


def test_the_axis_is_fe_where_all_runs_tell(tmp_path, no_labels):
    specs = [("a", dict(arm=0)), ("b", dict(arm=1))]
    for more, along, last in (((), "fe", 60_000), ((("old", dict(arm=2, fe=False)),), "tokens", 20_000)):
        (part,) = comparison_figure(arms_of(runs_of(tmp_path / along, *specs, *more))).subfigs
        assert part.get_supxlabel() == AXES[along]
        assert {line.get_xdata()[-1] for panel in part.axes for line in panel.lines} == {last}


def test_what_was_not_measured_has_no_panel_and_is_named(tmp_path, no_labels):
    arms = arms_of(runs_of(tmp_path, ("a", dict(probes="none")), ("b", dict(arm=1, probes="none"))))
    (part,) = comparison_figure(arms).subfigs
    assert [*panels(part)] == ["evaluation accuracy"]
    assert part.get_suptitle() == "not measured: share of hard rows"


def test_labels_stand_at_the_ends_of_their_lines(tmp_path):
    specs = [(f"{end}", dict(arm=i, accuracies=(0.1, 0.2, end))) for i, end in enumerate((0.9, 0.30, 0.31, 0.5))]
    figure = comparison_figure(arms_of(runs_of(tmp_path, *specs), "abcd"))
    panel = panels(figure)["evaluation accuracy"]
    assert labels(panel) == ["b", "c", "d", "a"], "from the lowest end to the highest"
    size, places = Text.get_window_extent(panel.texts[0]).height / panel.bbox.height, {}
    for text in panel.texts:
        end = panel.transAxes.inverted().transform(panel.transData.transform(text.xy))[1]
        places[text.get_text()] = end, text.get_position()[1]
    for name in "ad":
        assert places[name][0] == pytest.approx(places[name][1], abs=0.01), "that nothing crowds"
    middle = (places["b"][0] + places["c"][0]) / 2
    assert [places["b"][1], places["c"][1]] == pytest.approx([middle - size / 2, middle + size / 2], abs=0.01)


def crowd(tmp_path, arms, tiers, seeds=2):
    """``seeds`` runs for each of these arms, with these tiers."""
    parts = {tier: (0.1, 0.2, 0.3) for tier in tiers}
    settings = itertools.product(range(len(arms)), range(seeds))
    specs = [(f"{i}-seed{seed}", dict(seed=seed, arm=i, tiers=parts)) for i, seed in settings]
    return arms_of(runs_of(tmp_path, *specs), arms)


@pytest.mark.parametrize(
    "of_arms, tiers",
    [
        ([f"{name}-ARM" for name in ("GRPO", "retry", "mmm", "A", "B", "C", "D", "E")], ["easy", "hard"]),
        (
            [f"{'an-arm-that-is-called-after-its-deep-folder/' * 3}{i}" for i in range(3)],
            ["a-tier-whose-name-is-the-path-of-the-file-it-was-read-from", "easy", "hard"],
        ),
    ],
)
def test_no_text_is_upon_another(tmp_path, of_arms, tiers):
    figure = comparison_figure(crowd(tmp_path, of_arms, tiers))
    above = figure.subfigs[0]
    assert [*panels(above)][2:] == [f"tier {tier}" for tier in tiers]
    for panel in panels(above).values():
        assert [label[-5:] for label in labels(panel)] == [name[-5:] for name in of_arms], "all ends are the same"
    figure.draw_without_rendering()
    texts = [text for part in figure.subfigs for text in part.texts]
    for panel in figure.axes:
        if not panel.get_visible():
            continue
        texts += [panel._left_title, *panel.texts]
        for axis in (panel.xaxis, panel.yaxis):
            low, high = axis.get_view_interval()
            ticks = (tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high)
            texts += [tick.label1 for tick in ticks if tick.label1.get_visible()]
    boxes = [Text.get_window_extent(text) for text in texts]
    inside = figure.bbox.padded(1)
    for text, box in zip(texts, boxes, strict=True):
        assert inside.contains(*box.min) and inside.contains(*box.max), text
    for (one, a), (other, b) in itertools.combinations(zip(texts, boxes, strict=True), 2):
        assert not a.padded(-0.5).overlaps(b.padded(-0.5)), (one, other)


def test_no_two_arms_share_a_color(tmp_path, no_labels):
    figure = comparison_figure(crowd(tmp_path, [f"arm-{i}" for i in range(12)], [], seeds=1))
    looks = [[(line.get_color(), line.get_marker()) for line in means(panel)] for panel in panels(figure).values()]
    assert looks[0] == looks[1] and len({color for color, _ in looks[0]}) == 12


def test_of_many_runs_each_arm_has_a_panel_for_its_seeds(tmp_path, no_labels):
    arms = crowd(tmp_path, ["one", "two", "three"], ["easy", "hard"], seeds=4)
    assert sum(len(arm.runs) for arm in arms) > MOST_RUNS
    above, below = comparison_figure(arms).subfigs
    assert all(len(panel.lines) == 3 for panel in panels(above).values()), "the means alone"
    assert [*panels(below)] == ["one", "two", "three"]
    for color, panel in zip(COLORS, panels(below).values(), strict=False):
        own = [line for line in panel.lines if line.get_color() == color]
        assert len(own) == 4 + 1 and len(panel.lines) == 4 + 1 + 2


def test_runs_that_were_measured_once_are_points_and_their_mean_is_named(tmp_path):
    (arm,) = arms = arms_of(runs_of(tmp_path, ("a-seed0", dict(seed=0)), ("a-seed1", dict(seed=1))), ["once"])
    for run, fe, value in zip(arm.runs, (10_000, 30_000), (0.2, 0.6), strict=True):
        run.curves[ACCURACY] = [run.points(ACCURACY)[-1]._replace(fe=fe, value=value)]
    panel = panels(comparison_figure(arms))["evaluation accuracy"]
    (mean,) = means(panel)
    points = [line for line in panel.lines if line is not mean]
    assert [line.get_marker() for line in points] == [".", "."]
    assert mean.get_xydata().tolist() == [[20_000, pytest.approx(0.4)]] and labels(panel) == ["once"]
