"""Labels beside lines: near what they name, over nothing else, none forgotten."""

import io
import itertools

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot as plt
from support import direct_labels, figures
from support.direct_labels import label_lines

X = np.linspace(0, 10, 21)


@pytest.fixture(autouse=True)
def style():
    with mpl.rc_context(figures.STYLE):
        yield
    plt.close("all")


def texts(figure):
    """What is written in the panels: text → (axes, box in pixels)."""
    figure.draw_without_rendering()
    found = [(t.get_text(), ax, t.get_window_extent()) for ax in figure.axes for t in ax.texts]
    assert len({text for text, *_ in found}) == len(found)
    return {text: (ax, box) for text, ax, box in found}


def distance(box, line):
    """Pixels from a box to a line, seen at a thousand points."""
    x, y = line.get_transform().transform(line.get_xydata()).T
    at = np.linspace(0, len(x) - 1, 1000)
    x, y = (np.interp(at, np.arange(len(x)), values) for values in (x, y))
    across = np.maximum(np.maximum(box.x0 - x, x - box.x1), 0)
    return np.hypot(across, np.maximum(np.maximum(box.y0 - y, y - box.y1), 0)).min()


def panels(n=1, **options):
    figure, axes = plt.subplots(1, n, layout="constrained", squeeze=False, **options)
    return figure, axes[0]


@pytest.mark.parametrize("seed", range(8))
def test_every_label_is_beside_its_line_and_over_nothing(seed):
    random = np.random.default_rng(seed)
    figure, axes = panels(2, figsize=(7, 3), sharey=True)
    lines = {}
    for k, ax in itertools.product(range(4), axes):
        [line] = ax.plot(X, 3 * k + random.normal(size=21).cumsum() / 3, label=f"line {k}",
                         color=f"C{k}")  # fmt: skip
        lines[ax, f"line {k}"] = line
    assert label_lines(figure) == []
    found = texts(figure)
    assert found.keys() == {f"line {k}" for k in range(4)}
    for label, (ax, box) in found.items():
        frame = ax.get_window_extent()
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1, label
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1, label
        apart = {name: distance(box, line) for (at, name), line in lines.items() if at is ax}
        assert min(apart.values()) > 1, (label, apart)
        leaders = [a for a in ax.lines if a not in lines.values()]
        if not leaders:
            assert apart[label] <= min(apart.values()) + 1, (label, apart)
            assert apart[label] < 12
        assert all(not box.overlaps(other) for t, (at, other) in found.items()
                   if at is ax and t != label)  # fmt: skip


def test_a_label_stands_in_the_first_panel_with_room():
    figure, axes = panels(3, figsize=(9, 3), sharey=True)
    for ax, others in zip(axes, (40, 1, 1), strict=True):
        ax.plot(X, 0 * X + 5, label="named")
        for y in np.linspace(0, 10, others):
            ax.plot(X, 0 * X + y, color="grey")
    label_lines(figure)
    assert texts(figure)["named"][0] is axes[1]


def test_one_label_in_two_colours_is_written_twice():
    figure, axes = panels(2, figsize=(7, 3))
    for ax, color in zip(axes, ("black", figures.BLUE), strict=True):
        ax.plot(X, X, color=color, label="layer 1")
    label_lines(figure)
    assert [[t.get_text() for t in ax.texts] for ax in axes] == [["layer 1"], ["layer 1"]]


def test_of_two_lines_that_nearly_meet_each_has_its_label_on_its_own_side():
    figure, [ax] = panels(figsize=(4, 3))
    lower, upper = (ax.plot(X, 0 * X + y, label=f"{y}")[0] for y in (0, 0.01))
    ax.set_ylim(-1, 1)
    label_lines(figure)
    heights = {text: (box.y0 + box.y1) / 2 for text, (_, box) in texts(figure).items()}
    at = {str(k.get_label()): k.get_transform().transform([0, k.get_ydata()[0]])[1]
          for k in (lower, upper)}  # fmt: skip
    assert heights["0"] < at["0"] < at["0.01"] < heights["0.01"]


def test_a_leader_takes_the_way_that_crosses_least():
    figure, [ax] = panels(figsize=(4, 3))
    for k in range(-1, 4):
        ax.plot(X, 0 * X + 0.3 * k, color="black" if k else figures.BLUE,
                label="" if k else "named")  # fmt: skip
    ax.set_ylim(-4, 10)
    drawn = list(ax.lines)
    label_lines(figure)
    [leader] = set(ax.lines) - set(drawn)
    start, tip = leader.get_ydata()
    assert start < tip  # from below, past one line instead of three


def test_where_a_line_is_hemmed_in_something_leads_to_it():
    figure, [ax] = panels(figsize=(4, 3))
    for k in range(-3, 4):
        ax.plot(X, 0 * X + 0.3 * k, color="black" if k else figures.BLUE,
                label="" if k else "in the middle")  # fmt: skip
    ax.set_ylim(-10, 10)
    drawn = list(ax.lines)
    assert label_lines(figure) == []
    [(_, box)] = texts(figure).values()
    [leader] = set(ax.lines) - set(drawn)
    assert min(distance(box, line) for line in drawn) > 3
    ends = leader.get_transform().transform(leader.get_xydata())
    middle = drawn[3].get_transform().transform([0, 0])[1]
    assert ends[1, 1] == pytest.approx(middle, abs=1)
    assert distance(box, leader) < 1


def test_what_finds_no_place_is_in_a_legend_and_the_rest_is_not():
    figure, axes = panels(2, figsize=(5, 2.5))
    axes[0].plot(X, X, label="short")
    axes[1].plot(X, -X, color="grey", label="a label that is much too long for so small a panel")
    assert label_lines(figure) == ["a label that is much too long for so small a panel"]
    [legend] = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == [axes[1].lines[0].get_label()]
    found = texts(figure)
    assert found.keys() == {"short"}  # and placed once the legend was there
    assert 1 < distance(found["short"][1], axes[0].lines[0]) < 12


def test_points_and_bars_are_named_and_kept_free():
    figure, [ax] = panels(figsize=(5, 4))
    ax.fill_between(X, -4, -2, color="lightgrey")
    cloud = ax.scatter(X, np.sin(X), color=figures.VERMILION, label="cloud")
    bars = ax.errorbar(X, 0 * X + 3, 0.5, fmt="o", color="black", label="bars")
    assert label_lines(figure) == []
    found = texts(figure)
    at = cloud.get_offset_transform().transform(cloud.get_offsets())
    _, box = found["cloud"]
    assert not any(box.contains(*point) for point in at)
    _, box = found["bars"]
    for stem in bars[2][0].get_segments():
        x, y = ax.transData.transform(stem).T
        assert not (box.x0 <= x[0] <= box.x1 and box.y0 <= y.max() and y.min() <= box.y1)


def test_texts_that_were_there_stay_legible():
    figure, [ax] = panels(figsize=(3, 2))
    ax.plot(X, 0 * X, label="line")
    ax.set_ylim(-1, 1)
    note = ax.text(0.5, 0.55, "a note over the line", transform=ax.transAxes, ha="center")
    label_lines(figure)
    label = next(t for t in ax.texts if t is not note)
    figure.draw_without_rendering()
    assert not label.get_window_extent().overlaps(note.get_window_extent())


def test_letters_are_dark_enough_and_keep_their_hue():
    for color in (figures.ORANGE, figures.SKY, figures.GREEN, figures.VERMILION, figures.PURPLE):
        rgb = np.array(direct_labels.ink(color))
        assert 1.05 / (direct_labels._luminance(*rgb) + 0.05) >= 4.5
        original = np.array(mpl.colors.to_rgb(color))
        np.testing.assert_allclose(rgb / rgb.max(), original / original.max(), atol=1e-9)


def test_the_same_figure_has_the_same_labels():
    def drawn():
        figure, axes = panels(2, figsize=(6, 3))
        for k, ax in itertools.product(range(5), axes):
            ax.plot(X, np.sin(X + k), label=f"line {k}")
        label_lines(figure)
        return figures.as_svg(figure)

    assert drawn() == drawn()


def test_show_labels_lines_but_keeps_a_legend(monkeypatch):
    monkeypatch.setattr(figures.display, "display", lambda _: None)
    for legend in (False, True):
        figure, [ax] = panels(figsize=(4, 3))
        ax.plot(X, X, label="line")
        if legend:
            figure.legend()
        record = {"counts": False, "data": {"is_mnist": True}, "parameters": {"train_limit": 50}}
        figures.show(figure, record)
        assert [t.get_text() for t in ax.texts] == ([] if legend else ["line"])
        assert figure.get_suptitle() == "SMOKE SIZE: only 50 training images"
        assert not plt.fignum_exists(figure.number)


def test_a_picture_is_an_svg_without_a_date():
    figure, [ax] = panels()
    ax.plot(X, X)
    svg = figures.as_svg(figure)
    assert io.StringIO(svg).readline().startswith("<?xml")
    assert "dc:date" not in svg
