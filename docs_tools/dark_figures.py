"""Have a kernel give each figure twice: as it is, and with the colours of a dark page.

It is run inside the kernel, before a page's first block, and leaves no name there.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from IPython import get_ipython
from IPython.core.formatters import BaseFormatter
from IPython.core.pylabtools import print_figure
from traitlets import Unicode

MIME_TYPE = "application/x-dark-png"
INK, PAPER = "#dcdee5", "none"
COLOURS = ("color", "facecolor", "edgecolor", "markeredgecolor")


class DarkPNG(BaseFormatter):
    format_type = Unicode(MIME_TYPE)
    _return_type = str

    def __call__(self, shown: Any) -> str | None:
        # A printer registered for figures would be lost: Matplotlib's backend drops them all.
        matplotlib = sys.modules.get("matplotlib.figure")
        return dark_png(shown) if matplotlib and isinstance(shown, matplotlib.Figure) else None


def dark_png(figure: Any) -> str:
    """Draw the figure for a dark page; give the PNG in base 64."""
    with recoloured(figure):
        return print_figure(figure, "retina", base64=True)


@contextmanager
def recoloured(figure: Any) -> Iterator[None]:
    """Exchange black for a light ink and white for nothing, in all but the data."""
    from matplotlib.colors import to_rgba

    changed = []
    for artist in _furniture(figure):
        for name in COLOURS:
            getter = getattr(artist, f"get_{name}", None)
            setter = getattr(artist, f"set_{name}", None)
            if not getter or not setter:
                continue
            old = getter()
            try:
                *rgb, alpha = to_rgba(old)
            except ValueError:  # several colours: data
                continue
            if alpha and len(set(rgb)) == 1 and rgb[0] in (0, 1):
                setter(PAPER if rgb[0] else to_rgba(INK, alpha))
                changed.append((setter, old))
    try:
        yield
    finally:
        for setter, old in changed:
            setter(old)


def _furniture(figure: Any) -> Iterator[Any]:
    yield figure.patch
    yield from figure.texts
    for name in ("_suptitle", "_supxlabel", "_supylabel"):
        if getattr(figure, name, None):
            yield getattr(figure, name)
    legends = list(figure.legends)
    for axes in figure.axes:
        yield axes.patch
        yield from axes.spines.values()
        yield from (axes.title, axes._left_title, axes._right_title)
        for axis in (axes.xaxis, axes.yaxis):
            yield from (axis.label, axis.offsetText)
            for tick in axis.get_major_ticks() + axis.get_minor_ticks():
                yield from (tick.tick1line, tick.tick2line, tick.label1, tick.label2)
        if not axes.images:  # what is drawn upon a picture stays legible as it is
            yield from (*axes.lines, *axes.texts)
        if axes.get_legend():
            legends.append(axes.get_legend())
    for legend in legends:
        yield legend.get_frame()
        yield from legend.findobj(lambda artist: hasattr(artist, "get_text"))


display = get_ipython().display_formatter
display.formatters[MIME_TYPE] = DarkPNG(parent=display)
