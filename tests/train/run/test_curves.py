"""The curves of a run: the panels shown, their content, and the note on missing panels."""

import json
import warnings

import pytest
import yaml
from matplotlib import rc_context

from toolx_kernels.pictures import STYLE
from toolx_kernels.train.run import curves
from toolx_kernels.train.run.curves import SMOOTH, curves_figure, write_curves


@pytest.fixture(autouse=True)
def _style():
    with rc_context(STYLE):
        yield


ALL = [
    "evaluation accuracy: 10.0% to 30.0%", "mean reward", "share of hard rows: 80.0% to 40.0%",
    "truncated completions",
    "clipped tokens", "KL to the model before RL", "entropy (nats per token)", "completion length (tokens)",
    "gradient norm",
]  # fmt: skip


def step(number, **values):
    line = {"event": "step", "step": number, "reward": number / 100, "truncated": 0.0, "entropy": 0.5}
    return line | {"completion_length": 12.0, "grad_norm": 0.1} | values


def records(steps=30, **values):
    lines = [
        {"event": "data", "step": 0, "rows": 50},
        {"event": "eval", "step": 0, "accuracy": 0.1},
        {"event": "probe", "step": 0, "rows": 50, "hard": 40},
    ]
    lines += [step(number, **values) for number in range(1, steps + 1)]
    return [
        *lines,
        {"event": "eval", "step": steps, "accuracy": 0.3},
        {"event": "probe", "step": steps, "rows": 50, "hard": 20},
    ]


def titles(figure):
    return [axes.get_title("left") for axes in figure.axes]


def test_a_run_that_tells_everything_has_all_panels():
    figure = curves_figure(records(kl=0.01, clip_low=0.0, clip_high=0.02), "title")
    assert titles(figure) == ALL and figure.get_suptitle() == "title"
    assert figure.get_supxlabel() == f"thin: each step, thick: mean of {SMOOTH} steps"
    clipped = figure.axes[4]
    assert [text.get_text() for text in clipped.texts] == ["below", "above"]
    colors = [line.get_color() for axes in figure.axes for line in axes.lines if line.get_linewidth() > 1]
    assert len(set(colors)) == len(colors) == 10, "one for one thing"


def test_what_a_run_lacks_is_named_and_has_no_panel():
    figure = curves_figure(records(), "title")
    assert titles(figure) == [title for title in ALL if not title.startswith(("clipped", "KL"))]
    assert "not measured in this run: clipped tokens, KL to the model" in figure.get_supxlabel().replace("\n", " ")
    first, *others = (axes.get_subplotspec() for axes in figure.axes)
    assert first.colspan.stop - first.colspan.start == 2, "no place of the grid is empty"
    assert all(place.colspan.stop - place.colspan.start == 1 for place in others)
    figure = curves_figure([line for line in records(5) if line["event"] == "step"], "title")
    assert "evaluation accuracy, share of hard rows" in figure.get_supxlabel() and "thin" not in figure.get_supxlabel()


def test_a_partial_probe_is_no_drop_of_hard_rows():
    """``max_steps`` may end a run within a round, whose probe then covers fewer rows."""
    probes = [dict(step=3 * at, rows=rows, hard=hard) for at, (rows, hard) in enumerate([(12, 12), (4, 4), (12, 9)])]
    (axes,) = curves_figure([{"event": "probe"} | probe for probe in probes], "title").axes
    assert [*axes.lines[0].get_ydata()] == [1.0, 1.0, 0.75]


def test_many_steps_are_thin_below_their_mean_and_few_are_points():
    reward = curves_figure(records(), "title").axes[1]
    thin, thick = reward.lines
    assert [*thin.get_ydata()] == [number / 100 for number in range(1, 31)]
    assert thick.get_ydata()[-1] == pytest.approx(0.255) and thick.get_ydata()[1] == pytest.approx(0.015)
    (points,) = curves_figure(records(4), "title").axes[1].lines
    assert points.get_marker() == "o" and [*points.get_ydata()] == [0.01, 0.02, 0.03, 0.04]


@pytest.mark.parametrize("steps", [0, 1, 3, 1234])
def test_steps_on_the_axis_are_whole(steps):
    figure = curves_figure(records(steps), "title")
    for axes in figure.axes:
        low, high = axes.get_xlim()
        assert (low, high) == (0, max(1, steps))
        assert all(tick == int(tick) for tick in axes.get_xticks())
        assert 2 <= sum(low <= tick <= high for tick in axes.get_xticks()) <= 6


@pytest.mark.parametrize(
    ("rewards", "bottom", "top"), [((0, 0), 0, 1), ((-1, -0.5), -1.08, 0), ((-1, 0.5), -1.08, 0.54), ((0, 2), 0, 2.16)]
)
def test_the_axis_of_a_reward_holds_zero(rewards, bottom, top):
    figure = curves_figure([step(number, reward=reward) for number, reward in enumerate(rewards, 1)], "title")
    assert figure.axes[0].get_ylim() == pytest.approx((bottom, top))


def test_supervised_steps_are_gray():
    lines = [{"event": "sft", "step": number, "loss": 1.0, "grad_norm": 1.0} for number in (1, 2, 3)]
    figure = curves_figure(lines + [step(4), step(5)], "title")
    assert figure.get_supxlabel().startswith("gray: supervised steps")
    (span,) = figure.axes[0].patches
    assert (span.get_x(), span.get_width()) == (0, 3)


def test_nothing_to_draw_is_no_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "evaluation accuracy, mean reward" in curves_figure([], "title").get_supxlabel()


def test_odd_titles_and_infinite_values_are_drawn(tmp_path):
    records = [{"event": "step", "step": 1, "reward": 0.5, "grad_norm": float("inf")}]
    figure = curves_figure(records, f"a${'_long' * 30}$ on rows")
    figure.savefig(tmp_path / "curves.png")
    assert "\n" in figure.get_suptitle() and "gradient norm" in figure.get_supxlabel()


def test_an_old_run_folder_is_drawn_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": "tiny", "dataset": "builtin", "seed": 3}))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records(3)))
    assert write_curves(tmp_path)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    drawn = []
    monkeypatch.setattr(curves, "write_picture", lambda path, draw: drawn.append(path) or True)
    assert write_curves(tmp_path, tmp_path / "other.png") and drawn == [tmp_path / "other.png"]
