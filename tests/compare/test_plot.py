"""The picture: what its panels show, read from matplotlib's objects."""

import itertools

import pytest

from tests.compare.cases import runs_of, two_arms
from toolx_kernels.compare.arms import arms_of
from toolx_kernels.compare.plot import AXES, COLOURS, MARKERS, comparison_figure
from toolx_kernels.compare.runs import ACCURACY


def panels(figure):
    """The panels that are to be seen, by their titles."""
    return {panel.get_title().replace("\n", ""): panel for panel in figure.axes if panel.get_visible()}


def names(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def test_the_picture_has_a_panel_for_accuracy_for_hard_rows_and_for_each_tier(tmp_path):
    figure = comparison_figure(two_arms(tmp_path))
    assert [*panels(figure)] == ["held-out accuracy", "hard rows (no solved rollout)", "tier easy", "tier office"]
    assert names(figure) == ["base", "ours"]
    assert "unfinished" in figure.legends[0].get_title().get_text()


def test_a_tier_that_is_all_rows_has_no_panel(tmp_path):
    figure = comparison_figure(arms_of(runs_of(tmp_path, ("a", dict(tiers={"all": (0.1, 0.3, 0.5)})))))
    assert len(panels(figure)) == 2 and figure.legends[0].get_title().get_text() == ""


def test_a_thick_line_is_the_mean_and_a_thin_one_a_run(tmp_path):
    base, ours = arms = two_arms(tmp_path)
    panel = panels(comparison_figure(arms))["held-out accuracy"]
    for arm, colour in ((base, COLOURS[0]), (ours, COLOURS[1])):
        lines = [line for line in panel.lines if line.get_color() == colour]
        (mean,) = (line for line in lines if line.get_linewidth() == 2)
        assert [*map(tuple, mean.get_xydata())] == arm.mean_curve(ACCURACY, "fe")
        runs = [[*map(tuple, line.get_xydata())] for line in lines if line is not mean]
        assert runs == [[(point.fe, point.value) for point in run.points(ACCURACY)] for run in arm.runs]
        assert sum(line.get_linestyle() == ":" for line in lines) == (arm is ours), "the one at work is dotted"


def test_the_axis_is_fe_where_all_runs_tell(tmp_path):
    specs = [("a", dict(arm=0)), ("b", dict(arm=1))]
    figure = comparison_figure(arms_of(runs_of(tmp_path / "new", *specs)))
    assert figure.get_supxlabel() == AXES["fe"]
    assert {line.get_xdata()[-1] for panel in panels(figure).values() for line in panel.lines} == {60_000}
    specs.append(("old", dict(arm=2, fe=False)))
    figure = comparison_figure(arms_of(runs_of(tmp_path / "old", *specs)))
    assert figure.get_supxlabel() == AXES["tokens"]
    assert {line.get_xdata()[-1] for panel in panels(figure).values() for line in panel.lines} == {20_000}


def test_what_was_not_measured_is_said(tmp_path):
    arms = arms_of(runs_of(tmp_path, ("a", dict(probes="none")), ("b", dict(arm=1, probes="none"))))
    panel = panels(comparison_figure(arms))["hard rows (no solved rollout)"]
    assert [text.get_text() for text in panel.texts] == ["none measured"]


def crowd(tmp_path, arms, tiers):
    """Runs of as many arms and tiers as these names."""
    parts = {tier: (0.1, 0.2, 0.3) for tier in tiers}
    specs = [(f"{i}-seed{seed}", dict(seed=seed, arm=i, tiers=parts)) for i in range(len(arms)) for seed in (0, 1)]
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
    seen = panels(figure)
    assert [name.replace("\n", "") for name in names(figure)] == of_arms
    assert [*seen][2:] == [f"tier {tier}" for tier in tiers]
    figure.draw_without_rendering()
    labelled = [panel.xaxis.get_major_ticks()[0].label1.get_visible() for panel in seen.values()]
    columns = figure.axes[0].get_subplotspec().get_gridspec().ncols
    assert labelled == [i >= len(seen) - columns for i in range(len(seen))], "the last of each column"
    texts = [figure.legends[0], *figure.texts]
    for panel in seen.values():
        texts.append(panel.title)
        for axis in (panel.xaxis, panel.yaxis):
            low, high = axis.get_view_interval()
            ticks = (tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high)
            texts += [tick.label1 for tick in ticks if tick.label1.get_visible()]
    boxes = [text.get_window_extent() for text in texts]
    inside = figure.bbox.padded(1)
    for text, box in zip(texts, boxes, strict=True):
        assert inside.contains(*box.min) and inside.contains(*box.max), text
    for (one, a), (other, b) in itertools.combinations(zip(texts, boxes, strict=True), 2):
        assert not a.padded(-0.5).overlaps(b.padded(-0.5)), (one, other)


def test_the_looks_of_many_arms_differ(tmp_path):
    figure = comparison_figure(crowd(tmp_path, [f"arm-{i}" for i in range(9)], ["one", "two"]))
    (legend,) = figure.legends
    looks = [(line.get_color(), line.get_marker()) for line in legend.get_lines()]
    assert len(set(looks)) == 9 and len({colour for colour, _ in looks[:8]}) == 8
    assert len(COLOURS) != len(MARKERS)
    for panel in panels(figure).values():
        means = [line for line in panel.lines if line.get_linewidth() == 2]
        assert [(line.get_color(), line.get_marker()) for line in means] == looks
