"""The report of ``toolx compare``: files and screen output."""

import json
import math
import re
from pathlib import Path

import pytest

from tests.compare.cases import runs_of, two_arms, write_run
from toolx_kernels.cli.commands import main
from toolx_kernels.compare.arms import arms_of
from toolx_kernels.compare.figures import figures
from toolx_kernels.compare.report import describe, write_comparison
from toolx_kernels.compare.tables import arm_table, difference_table, forgetting_table, run_table, tier_table
from toolx_kernels.evaluate.intervals import mean_of


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two arms, and the folder with their comparison."""
    tmp_path = tmp_path_factory.mktemp("compared")
    arms = two_arms(tmp_path)
    write_comparison(tmp_path / "out" / "comparison", arms)
    return arms, tmp_path / "out" / "comparison"


def test_the_files_say_what_the_figures_say(compared):
    _, folder = compared
    written = json.loads((folder / "comparison.json").read_text())
    ours = written["ours"]
    assert ours["accuracy"]["difference"]["value"] == pytest.approx(0.2)
    assert ours["accuracy"]["after"]["interval"] == pytest.approx([*mean_of([0.6, 0.8, 1.0])[1:]])
    half = 4.302653 / math.sqrt(3)
    assert ours["relapse_rate_difference"]["value"] == pytest.approx(-1 / 30)
    assert ours["relapse_rate_difference"]["interval"] == pytest.approx([(-1 - half) / 30, (-1 + half) / 30])
    assert ours["tiers"]["office"]["difference"]["pairs"] == 2 and ours["fe"]["value"] == 60_000
    assert written["base"]["tiers"]["easy"]["difference"] is None
    picture = (folder / "comparison.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 50_000
    assert sorted(path.name for path in folder.iterdir()) == ["comparison.json", "comparison.md", "comparison.png"]


def test_every_table_is_on_the_page_and_on_the_screen(compared):
    arms, folder = compared
    page, said = (folder / "comparison.md").read_text(), describe(arms)
    assert page.startswith("![curves](comparison.png)")
    rows = (
        [
            "ours",
            "3 (+1 unfinished)",
            "0.100",
            "0.800 [0.303, 1.297]",
            "40.0",
            "15.0 [15.0, 15.0]",
            "0",
            "60,000",
            "20,000",
            "60",
        ],
        ["minus base", "accuracy", "hard rows", "share that turned hard again"],
        ["ours", "+0.200 [-0.048, +0.448], n = 3", "-7.0 [-12.0, -2.0], n = 3", "-0.033 [-0.116, +0.049], n = 3"],
        ["base", "2.0", "7.0", "0.233 [0.151, 0.316]"],
        ["office", "", "", ""],
        ["  ours", "0.000 [0.000, 0.000]", "0.200 [0.200, 0.200]", "-0.100 [-0.100, -0.100], n = 2"],
    )
    on_screen = [[*filter(None, re.split(" {2,}", line))] for line in said.splitlines()]
    for cells in rows:
        assert "| " + " | ".join(cells).replace("  ours", "&nbsp;&nbsp;ours") + " |" in page
        assert [*filter(None, (cell.strip() for cell in cells))] in on_screen, cells
    late = arms[1].runs[-1].path
    assert f"| {late} | ours | 9 | 10, unfinished | 30,000 | 10,000 | – | 0.300 → 0.400 | 40 → 1 | – | – |" in page
    assert str(late) not in said


def test_what_older_runs_do_not_tell_is_a_dash(tmp_path):
    old = ("old", dict(arm=0, fe=False, seconds=None, probes="none", round_steps=100))
    new = ("new", dict(arm=1, relapsed=(0, 1, 2), tiers={"easy": (0, 0, 0), "hard": (0, 0, 1)}))
    arms = arms_of(runs_of(tmp_path, old, new))
    of_arms = figures(arms)
    assert arm_table(of_arms)[1] == ["old", "1", "0.100", "0.500", "–", "–", "–", "–", "20,000", "–"]
    assert difference_table(of_arms)[1] == ["new", "+0.000, n = 1", "–", "–"]
    assert forgetting_table(of_arms)[1:] == [["old", "0.0", "–", "–"], ["new", "2.0", "3.0", "0.100"]]
    assert tier_table(of_arms)[2:4] == [["  old", "–", "–", "–"], ["  new", "0.000", "0.000", "–"]]
    assert run_table(arms)[1][4:] == ["–", "20,000", "–", "0.100 → 0.500", "–", "–", "–"]


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [str(write_run(tmp_path / name, seed=i)) for i, name in enumerate(("a-0", "a-1"))]
    assert main(["compare", *folders]) == 0
    out = capsys.readouterr().out
    assert "0.500 [0.500, 0.500]" in out and "runs/comparison/comparison.md" in out and "minus" not in out
    assert main(["compare", folders[0], "--names", "mine", "--output", "one"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].startswith("mine ") and (tmp_path / "one" / "comparison.png").is_file()
    assert "They replace" not in out
    assert main(["compare", folders[1], "--output", "one"]) == 0
    assert "and comparison.json. They replace the comparison that was there." in capsys.readouterr().out
    before = (tmp_path / "one" / "comparison.md").read_text()
    (tmp_path / "one" / "notes.txt").write_text("")
    for output, other in (("one", "notes.txt"), (folders[0], "config.yaml")):
        assert main(["compare", folders[0], "--output", output]) == 2
        said = f"--output {output} holds {other}, which is no comparison's: name a new folder."
        assert said in capsys.readouterr().err
    assert (tmp_path / "one" / "comparison.md").read_text() == before
    assert sorted(path.name for path in Path(folders[0]).iterdir()) == ["config.yaml", "metrics.jsonl", "summary.json"]


@pytest.mark.parametrize(
    "argv, named",
    [
        (["nowhere"], "There is no run in nowhere"),
        (["run", "run"], "A run is given twice"),
        (["run", "--names", "a", "b"], "--names gives 2 names for 1 runs"),
        (["run", "--output", "file"], "--output file is a file"),
        ([], "RUN"),
    ],
)
def test_bad_flags(argv, named, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    assert main(["compare", *argv]) == 2
    assert named in capsys.readouterr().err.strip().splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"], "nothing may be written"
