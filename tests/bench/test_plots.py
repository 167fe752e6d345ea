"""Pictures of the benchmarks, drawn from the reports in bench/results: ticks, colors, and what is said of gaps."""

import shutil

import pytest
from matplotlib import rc_context

from bench.common.plots import PROVIDERS, bars, colors_of
from bench.common.tables import RESULTS, rows_in
from bench.loss import providers as loss
from bench.loss.report import REPORT as LOSS
from bench.rollout import providers as rollout
from bench.rollout.report import REPORT as ROLLOUT
from bench.step import providers as step
from bench.step.report import REPORT as STEP
from toolx_kernels.pictures import STYLE

FOLDER = RESULTS / "intel-xeon-processor-2-cores"


@pytest.fixture(scope="module")
def figures():
    with rc_context(STYLE):
        drawn = {name: draw for report in (LOSS, ROLLOUT, STEP) for name, draw in pictures(report).items()}
        return {name: draw() for name, draw in drawn.items()}


def pictures(report):
    return report.pictures(rows_in(FOLDER / f"{report.name}.csv"))


def texts(panel):
    return [text.get_text() for text in panel.texts]


def seen_ticks(axis):
    low, high = sorted(axis.get_view_interval())
    return [tick for tick in axis.get_majorticklocs() if low <= tick <= high]


def test_every_axis_has_ticks_at_plain_numbers(figures):
    assert len(figures) == 5
    for name, figure in figures.items():
        figure.draw_without_rendering()
        for panel in figure.axes:
            for axis in (panel.xaxis, panel.yaxis):
                assert len(seen_ticks(axis)) >= 2, name
                assert not any("10^" in label.get_text() for label in axis.get_majorticklabels())
    memory, dead = figures["loss_memory.png"].axes[0], figures["loss_dead.png"].axes[0]
    assert len(seen_ticks(memory.yaxis)) == 4 and [*memory.get_xticks()] == [1024, 4096]
    assert [label.get_text() for label in dead.get_xticklabels()] == ["0%", "50%", "80%"]


def test_bars_that_are_missing_are_named_in_their_place(figures):
    *measured, last = figures["loss_time.png"].axes
    assert texts(last) == ["1.22", "1.59"] + ["not measured"] * 4
    assert all(len(panel.patches) == 6 and "not measured" not in texts(panel) for panel in measured)
    assert "Liger cross-entropy (its Triton kernels need a GPU)" in figures["loss_time.png"].get_supxlabel()
    slower = figures["rollout.png"].axes[2]
    assert texts(slower) == ["194", "42.0", "not measured"] and len(slower.patches) == 2
    said = figures["rollout.png"].get_supxlabel().replace("\n", " ")
    assert "vLLM (vllm is not installed: pip install vllm); nano-vllm (" in said
    assert "measured at other cases: toolx, gradient checkpointing; TRL, " in figures["step.png"].get_supxlabel()


def test_a_reason_stands_in_the_place_of_its_bar():
    from matplotlib.figure import Figure

    panel = Figure().subplots()
    bars(panel, {"toolx": 1.0, "peer": None}, {"toolx": "black"}, {"peer": "out of memory"})
    assert texts(panel) == ["1.00", "out of memory"] and len(panel.patches) == 1
    assert [label.get_text() for label in panel.get_yticklabels()] == ["toolx", "peer"]


def test_lines_are_named_at_their_ends(figures):
    assert texts(figures["loss_memory.png"].axes[0])[0] == "toolx"
    assert [texts(panel) for panel in figures["step.png"].axes] == [["toolx", "TRL"]] * 2


@pytest.mark.parametrize("kind", [loss, rollout, step], ids=lambda kind: kind.__name__)
def test_no_two_providers_of_a_picture_share_a_color(kind):
    named = {getattr(each, "name", None) for each in vars(kind).values()} & PROVIDERS.keys()
    named -= {"floor", "floor, live rows"}  # drawn broken, in gray
    rows = [{"provider": name} for name in ["unknown", *sorted(named), "unknown too"]]
    assert len(named) > 4 and len(set(colors_of(rows).values())) == len(rows)
    assert colors_of(rows[1:2]).items() <= colors_of(rows).items(), "the same in every picture"


def test_pictures_are_drawn_anew_from_a_table(tmp_path):
    shutil.copy(FOLDER / "step.csv", tmp_path)
    assert STEP.main([str(tmp_path / "step.csv")]) == 0
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
