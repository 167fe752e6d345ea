"""Pictures: the palette of all plots, labels at the ends of their lines, and PNG files that are whole or absent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from toolx_kernels.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# Okabe and Ito's colors, which color-blind readers tell apart, without the yellow that fades on white; the last three
# are Paul Tol's
BLUE, VERMILION, GREEN, PINK, BLACK, AMBER, SKY, WINE, INDIGO, OLIVE = COLORS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#882255", "#332288", "#999933",
)  # fmt: skip
GRAY = "0.6"  # of what stands behind the others
MARKERS = "osD^vPX"
WIDTH = 6.0  # inches of a picture: at the 8 cm of a printed column its text has 5 to 6 points
DPI = 160
LABELS_AT = 1.06  # of a panel's width
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "savefig.facecolor": "white",  # also on a dark page
}


def write_picture(path: Path, draw: Callable[[], Figure]) -> bool:
    """Draws into ``path``, which is replaced as a whole. Without matplotlib one line says so and False comes back."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print(f"{path.name} was not drawn: `pip install matplotlib` brings what draws it.")
        return False
    image = BytesIO()
    with matplotlib.rc_context(STYLE):
        draw().savefig(image, dpi=DPI, format="png")
    write_atomically(path, image.getvalue())
    return True


def distinct_colors(count: int) -> Sequence[str]:
    """``count`` different colors: the palette, or as many shades from dark to light where that is too small."""
    if count <= len(COLORS):
        return COLORS[:count]
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](0.9 * at / (count - 1))) for at in range(count)]


def panel_grid(figure: Figure | SubFigure, count: int) -> list[Axes]:
    """``count`` panels in two columns; the first of an odd number has a row of its own."""
    grid = figure.add_gridspec(max(1, math.ceil(count / 2)), 2)
    if count % 2 == 0:
        return [figure.add_subplot(grid[at // 2, at % 2]) for at in range(count)]
    return [figure.add_subplot(grid[(at + 1) // 2, (at + 1) % 2] if at else grid[0, :]) for at in range(count)]


@dataclass(frozen=True, slots=True)
class LineEnd:
    """The end of a line in data coordinates, and its label."""

    x: float
    y: float
    text: str
    color: str


def label_ends(figure: Figure, ends: dict[Axes, list[LineEnd]]) -> None:
    """Labels the lines of each panel at its right side, without overlap if the panel is high enough. A thin line
    connects a label with its end; it is dotted if it crosses much of the panel. Fixes the figure's layout."""
    from matplotlib.colors import to_rgb
    from matplotlib.text import Text

    labels = {panel: sorted(of_panel, key=lambda end: end.y) for panel, of_panel in ends.items()}
    texts = {
        panel: [
            panel.annotate(
                end.text,
                (end.x, end.y),
                (LABELS_AT, 0.5),
                textcoords="axes fraction",
                color=[0.75 * part for part in to_rgb(end.color)],  # darker than a line, to be read
                verticalalignment="center",
                annotation_clip=False,
                arrowprops={
                    "arrowstyle": "-", "color": end.color, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 3,
                    "relpos": (0, 0.5), "linestyle": "-" if end.x > 0.8 * panel.get_xlim()[1] else ":",
                },
            )
            for end in of_panel
        ]
        for panel, of_panel in labels.items()
    }  # fmt: skip
    figure.draw_without_rendering()  # the layout leaves room for them
    figure.set_layout_engine("none")
    for panel, of_panel in texts.items():
        to_axes = panel.transData + panel.transAxes.inverted()
        wanted = [to_axes.transform(text.xy)[1] for text in of_panel]
        sizes = [Text.get_window_extent(text).height / panel.bbox.height for text in of_panel]
        for text, place in zip(of_panel, spread(wanted, sizes), strict=True):
            text.set_position((LABELS_AT, place))


def spread(wanted: Sequence[float], sizes: Sequence[float], low: float = 0.0, high: float = 1.0) -> list[float]:
    """The centers nearest to the ascending ``wanted`` ones (least squares) at which intervals of these sizes do not
    overlap, and stay between ``low`` and ``high`` if they fit.

    >>> [round(place, 3) for place in spread([0.5, 0.5, 0.9], [0.1, 0.1, 0.1])]
    [0.45, 0.55, 0.9]
    """
    offsets = [sum(sizes[:at]) + sizes[at] / 2 for at in range(len(sizes))]
    blocks: list[list[float]] = []  # of neighbors that touch: where each would begin if it were alone
    for place, offset in zip(wanted, offsets, strict=True):
        blocks.append([place - offset])
        while len(blocks) > 1 and fmean(blocks[-2]) > fmean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    most = high - sum(sizes)
    begins = [max(low, min(most, fmean(block))) for block in blocks for _ in block]
    return [begin + offset for begin, offset in zip(begins, offsets, strict=True)]
