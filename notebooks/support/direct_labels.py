"""Labels written beside the lines they name, in their colours, instead of a legend.

matplotlib places legends, not labels at lines; this module looks for the places. What finds no
place is put into a legend under the figure, so that no line ever stays without its name.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from matplotlib import colors
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.container import Container
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

Array = NDArray[np.float64]
Points = Array  # [n, 2], in pixels, like all that follow
Boxes = Array  # [k, 4]: left, bottom, right, top
Name = tuple[str, tuple[float, float, float]]  # a label, and the colour of its letters

CONTRAST = 4.5  # of text on white, as WCAG asks for
# In units of the letters' size:
GAP = 0.35  # between a line and its label
ROOM = 0.9  # around a label: more is no better
LEAST = 0.25  # less is no place
STEP = 0.4  # between points of a line


def label_lines(figure: Figure, *, size: float = 10) -> list[str]:
    """Write every line's label beside it, once in the figure, which is finished but for that.

    A label goes to the panel and the place with most room around it; of panels with room enough,
    to the first one. Where none has room, a thin line leads from the label to what it names.

    Args:
        figure: With lines, or clouds of points, that have labels, as for a legend; those of one
            label and colour, in several panels, count as one.
        size: Of the letters, in points.

    Returns:
        The labels that found no place at all; they are in a legend under the figure.
    """
    left_over: list[Name] = []
    while True:
        figure.draw_without_rendering()  # places what the layout decides
        lines: dict[Name, list[tuple[_Panel, Artist]]] = {}
        for panel in [_Panel(ax, size * figure.dpi / 72) for ax in figure.axes if ax.axison]:
            for line, name in panel.names.items():
                lines.setdefault(name, []).append((panel, line))
        homeless = _write({name: lines[name] for name in lines if name not in left_over}, size)
        if not homeless:
            return [label for label, _ in left_over]
        left_over += homeless  # a legend takes space from the panels: once more
        for legend in figure.legends:
            legend.remove()
        handles = [lines[name][0][1] for name in left_over]
        labels = [label for label, _ in left_over]
        figure.legend(handles, labels, loc="outside lower center", ncols=3)


def ink(color: Any) -> tuple[float, float, float]:
    """A colour, darkened until text of it can be read on white.

    >>> ink("black"), ink("#0072B2") == colors.to_rgb("#0072B2"), ink("#E69F00")[0] < 0.7
    ((0.0, 0.0, 0.0), True, True)
    """
    r, g, b = colors.to_rgb(color)
    share = 1.0
    while 1.05 / (_luminance(share * r, share * g, share * b) + 0.05) < CONTRAST:
        share -= 0.01
    return share * r, share * g, share * b


def _luminance(*rgb: float) -> float:
    """WCAG's relative luminance."""
    parts = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in rgb]
    return float(np.dot([0.2126, 0.7152, 0.0722], parts))


def _write(lines: dict[Name, list[tuple[_Panel, Artist]]], size: float) -> list[Name]:
    """Write the labels; those that find no place are given back, and then none is written."""
    worth = {name: _best(name[0], found, size).worth for name, found in lines.items()}
    written: list[Artist] = []
    homeless = []
    for name in sorted(worth, key=worth.__getitem__):  # the hardest first
        place = _best(name[0], lines[name], size)
        if place.worth > -np.inf:
            written += place.panel.write(name, place, size)
        else:
            homeless.append(name)
    for artist in written if homeless else []:
        artist.remove()
    return homeless


def _best(label: str, lines: list[tuple[_Panel, Artist]], size: float) -> _Place:
    """The place with most room, of the first panel that has enough; else one further away."""
    found = []
    for panel, line in lines:
        found.append(panel.beside(line, panel.extent(label, size)))
        if found[-1].worth > 1.5 * ROOM - 1e-3:
            break
    best = max(found, key=lambda place: round(place.worth, 6))
    if best.worth == -np.inf:
        away = [panel.away(line, panel.extent(label, size)) for panel, line in lines]
        best = max(away, key=lambda place: round(place.worth, 6))
    return best


class _Place(NamedTuple):
    """Where a label can stand."""

    worth: float  # the more, the better; -inf: it cannot stand there
    panel: _Panel
    box: Array  # what it covers, [4]
    leader: Points  # ends of a line from there to the line it names, [2, 2], or [0, 2]: neighbours


class _Panel:
    """What stands in the axes, where labels must not be."""

    def __init__(self, ax: Axes, em: float) -> None:
        self.ax, self.em = ax, em  # em: the letters' size in pixels
        self.frame: Array = np.asarray(ax.get_window_extent().extents)
        found = {a: self._points(a) for a in [*ax.lines, *ax.collections] if a.get_visible()}
        self.lines = {artist: points for artist, points in found.items() if len(points)}
        self.texts = [np.asarray(text.get_window_extent().extents) for text in ax.texts]
        self.names: dict[Artist, Name] = {}
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            line: Any = handle[0] if isinstance(handle, Container) else handle
            if line in self.lines:
                is_line = isinstance(line, Line2D)
                color = line.get_color() if is_line else line.get_facecolor()[0]
                self.names[line] = str(label), ink(color)

    def extent(self, label: str, size: float) -> Array:
        """Width and height of a text."""
        text = self.ax.text(0, 0, label, fontsize=size)
        extent = text.get_window_extent()
        text.remove()
        return np.array([extent.width, extent.height])

    def beside(self, line: Artist, extent: Array) -> _Place:
        """The place over, under or beside a line with most room, the leftmost of several."""
        (width, height), gap = extent, GAP * self.em
        points, of_its_name = self.lines[line], np.concatenate(self._alike(line))
        corners = [(-share * width, y) for share in (0, 0.5, 1) for y in (gap, -gap - height)]
        corners += [(gap, -height / 2), (-gap - width, -height / 2)]
        boxes = _boxes((points[::2, None] + np.array(corners)).reshape(-1, 2), extent)
        boxes = boxes[np.argsort(boxes[:, 0], kind="stable")]
        room, apart = self._room(boxes, line), _apart(boxes, _tiny(of_its_name))
        own = apart.min(1) / self.em
        # If a label can be elsewhere, it should not stand where its line runs with others,
        alone = self._room(_tiny(of_its_name[apart.argmin(1)]), line).clip(0)
        # nor where another is the nearer one.
        worth = room + alone / 2 - (room < own)
        worth[(room < LEAST) | (own < 0.8 * GAP)] = -np.inf
        k = int(np.argmax(worth.round(6)))
        return _Place(float(worth[k]), self, boxes[k], np.empty((0, 2)))

    def away(self, line: Artist, extent: Array) -> _Place:
        """The place with room from which a straight way to the line is short and crosses least."""
        spans = zip(self.frame[:2], self.frame[2:] - extent, strict=True)
        corners = np.meshgrid(*(np.arange(low, high, self.em) for low, high in spans))
        boxes = _boxes(np.stack(corners, axis=-1).reshape(-1, 2), extent)
        of_its_name = np.concatenate(self._alike(line))
        near = np.minimum(self._room(boxes, line), _gaps(boxes, _tiny(of_its_name)) / self.em)
        best = _Place(-np.inf, self, np.zeros(4), np.empty((0, 2)))
        boxes = boxes[near > 0.5 * ROOM]
        for tip in self.lines[line][::5] if len(boxes) else []:
            starts = tip.clip(boxes[:, :2], boxes[:, 2:])
            far = np.hypot(*(tip - starts).T) / self.em
            short = np.argsort(far.round(6), kind="stable")[:20]
            worth = -far[short] - 5 * self._crossed(starts[short], tip, line)
            k = short[np.argmax(worth.round(6))]
            if worth.max() > best.worth + 1e-6:
                best = _Place(float(worth.max()), self, boxes[k], np.stack([starts[k], tip]))
        return best

    def write(self, name: Name, place: _Place, size: float) -> list[Artist]:
        """Write a label, and draw what leads from it to its line."""
        label, color = name
        to_axes = self.ax.transAxes.inverted().transform
        x, y = to_axes(place.box.reshape(2, 2).mean(0))
        style: Any = {"transform": self.ax.transAxes, "color": color}
        text = self.ax.text(x, y, label, ha="center", va="center", fontsize=size, **style)
        written: list[Artist] = [text]
        if len(place.leader):
            leader = Line2D(*to_axes(place.leader).T, linewidth=0.7, **style)
            written.append(self.ax.add_artist(leader))
            self.lines[leader] = _dense(place.leader, STEP * self.em)
        for artist in written:
            artist.set_in_layout(False)
        self.texts.append(place.box)
        return written

    def _points(self, artist: Any) -> Points:
        """Points of what is drawn, so dense that no label slips through, as far as seen."""
        strokes = []  # none: a ground, on which one can write
        if isinstance(artist, Line2D):
            strokes = [artist.get_transform().transform(artist.get_xydata())]
        elif isinstance(artist, LineCollection):
            strokes = [artist.get_transform().transform(part) for part in artist.get_segments()]
        elif isinstance(artist, PathCollection):
            offsets: Points = np.ma.filled(np.ma.asarray(artist.get_offsets(), dtype=float), np.nan)
            strokes = [artist.get_offset_transform().transform(offsets)]
        dots = isinstance(artist, PathCollection) or artist.get_linestyle() == "None"
        strokes = strokes if dots else [_dense(stroke, STEP * self.em) for stroke in strokes]
        points: Points = np.concatenate([np.empty((0, 2)), *strokes])
        inside: Points = points[
            ((points >= self.frame[:2]) & (points <= self.frame[2:])).all(1)  # False for NaN
        ]
        return inside

    def _alike(self, line: Artist) -> list[Points]:
        """The lines that have the name of this one."""
        return [p for other, p in self.lines.items() if self.names.get(other) == self.names[line]]

    def _others(self, line: Artist) -> list[Boxes]:
        """The lines of other names or of none, and all texts."""
        name = self.names[line]
        lines = [_tiny(p) for other, p in self.lines.items() if self.names.get(other) != name]
        return [*lines, *(text[None] for text in self.texts)]

    def _room(self, boxes: Boxes, line: Artist) -> Array:
        """From each box to what is nearest but lines of its name, in the letters' size; [k]."""
        inner = np.concatenate([boxes[:, :2] - self.frame[:2], self.frame[2:] - boxes[:, 2:]], 1)
        room = np.minimum(3 * inner.min(1), ROOM * self.em)  # the frame may be nearer than a line
        for other in self._others(line):
            room = np.minimum(room, _gaps(boxes, other))
        room[inner.min(1) < 0] = -np.inf
        in_letters: Array = room / self.em
        return in_letters

    def _crossed(self, starts: Points, tip: Array, line: Artist) -> Array:
        """How many other lines and texts are met on the ways from some points to one; [k]."""
        along = np.linspace(0, 1, 17)[:, None]
        ways = _tiny((starts[:, None] + (tip - starts)[:, None] * along).reshape(-1, 2))
        crossed = np.zeros(len(starts))
        for other in self._others(line):
            crossed += (_gaps(ways, other) < STEP * self.em).reshape(len(starts), -1).any(1)
        return crossed


def _dense(corners: Points, step: float) -> Points:
    """Points of a polygonal line, at most a step apart."""
    corners = corners[np.isfinite(corners).all(1)]
    if len(corners) < 2:
        return corners
    along = np.concatenate([[0], np.hypot(*np.diff(corners, axis=0).T).cumsum()])
    at = np.linspace(0, along[-1], 2 + int(along[-1] / step))
    return np.stack([np.interp(at, along, x) for x in corners.T], axis=1)


def _boxes(corners: Points, extent: Array) -> Boxes:
    """Boxes of one width and height by their lower left corners."""
    return np.concatenate([corners, corners + extent], axis=1)


def _tiny(points: Points) -> Boxes:
    """Points as boxes."""
    return np.tile(points, 2)


def _apart(boxes: Boxes, others: Boxes) -> Array:
    """From each box to each other one, 0 where they meet; [k, n]."""
    dx = np.maximum(boxes[:, None, 0] - others[:, 2], others[:, 0] - boxes[:, None, 2])
    dy = np.maximum(boxes[:, None, 1] - others[:, 3], others[:, 1] - boxes[:, None, 3])
    return np.asarray(np.hypot(dx.clip(0), dy.clip(0)))


def _gaps(boxes: Boxes, others: Boxes) -> Array:
    """From each box to the nearest other one; [k]."""
    gaps: Array = _apart(boxes, others).min(1, initial=np.inf)
    return gaps
