"""Pictures: places of labels, colors, and files that are whole or absent."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from toolx_kernels.pictures import COLORS, distinct_colors, spread, write_picture

places = st.lists(st.floats(-0.2, 1.2), min_size=1, max_size=8).map(sorted)


@given(places, st.floats(0.01, 0.12))
def test_labels_never_overlap_and_move_no_more_than_they_must(wanted, size):
    found = spread(wanted, [size] * len(wanted))
    assert all(b - a >= size - 1e-9 for a, b in zip(found, found[1:], strict=False))
    assert found[0] >= size / 2 - 1e-9 and found[-1] <= 1 - size / 2 + 1e-9
    free = all(b - a >= size for a, b in zip(wanted, wanted[1:], strict=False))
    if free and wanted[0] >= size / 2 and wanted[-1] <= 1 - size / 2:
        assert found == pytest.approx(wanted)


def test_two_labels_part_from_their_middle_and_high_ones_take_more_room():
    assert spread([0.5, 0.52], [0.1, 0.3]) == pytest.approx([0.41, 0.61])
    assert spread([0.0, 1.0], [0.2, 0.2]) == pytest.approx([0.1, 0.9])


@pytest.mark.parametrize("count", [1, 10, 11, 30])
def test_colors_are_all_different(count):
    assert len(set(distinct_colors(count))) == count
    assert count > 10 or distinct_colors(count) == COLORS[:count]


def test_a_picture_is_white_and_replaces_the_old_one_only_when_it_is_drawn(tmp_path):
    from matplotlib.image import imread

    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        write_picture(path, lambda: Figure(figsize=(1, 1 / 0)))
    assert path.read_bytes() == b"old"
    assert write_picture(path, lambda: Figure(figsize=(1, 1)))
    assert (imread(path) == 1).all() and [*tmp_path.iterdir()] == [path]


def test_without_matplotlib_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not write_picture(tmp_path / "a.png", Figure)
    assert capsys.readouterr().out == "a.png was not drawn: `pip install matplotlib` brings what draws it.\n"
    assert not [*tmp_path.iterdir()]
