"""Figures that are inspected or left blank: labels, legends beside the data, overlapping texts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations

import pytest
from matplotlib.figure import Figure


@contextmanager
def drawn() -> Iterator[list[Figure]]:
    """Yield a list of the figures that are saved inside, laid out but not rendered."""
    found = []

    def savefig(figure, path, **_):
        figure.draw_without_rendering()
        found.append(figure)
        path.write_bytes(b"no picture")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        yield found


@contextmanager
def blank() -> Iterator[None]:
    """Save figures as empty files: rendering them takes most of a small run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, path, **_: path.write_bytes(b""))
        yield


def unlabeled(figure):
    """Return the titles of axes that lack a label where they show numbers or names of ticks."""
    found = []
    for axes in figure.axes:
        framed = axes.spines["left"].get_visible() or axes.spines["bottom"].get_visible()
        for axis in (axes.xaxis, axes.yaxis):
            ticks = any(label.get_text() and label.get_visible() for label in axis.get_ticklabels())
            if framed and ticks and not axis.get_label().get_text():
                found.append((axes.get_title(loc="left"), axis.axis_name))
    return found


def legends_on_data(figure):
    """Return the legends that overlap any axes."""
    legends = [*figure.legends, *filter(None, (axes.get_legend() for axes in figure.axes))]
    return [
        [text.get_text() for text in legend.get_texts()]
        for legend in legends
        for axes in figure.axes
        if overlap(legend.get_window_extent(), axes.get_window_extent())
    ]


def overlapping_texts(figure):
    """Return pairs of horizontal or vertical texts that overlap."""
    texts = [figure._suptitle] if figure._suptitle else []
    for legend in figure.legends:
        texts += legend.get_texts()
    for axes in figure.axes:
        texts += [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        texts += [axes.xaxis.get_offset_text(), axes.yaxis.get_offset_text()]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if low <= tick.get_loc() <= high:
                    texts += [tick.label1, tick.label2]
        if axes.get_legend():
            texts += axes.get_legend().get_texts()
    boxes = [
        (text.get_text(), text.get_window_extent())
        for text in texts
        if text.get_visible() and text.get_text().strip() and text.get_rotation() % 90 == 0
    ]
    return [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if overlap(one, other)]


def overlap(one, other, slack=1.0):
    """Return whether two boxes overlap by more than some pixels."""
    across = min(one.x1, other.x1) - max(one.x0, other.x0)
    along = min(one.y1, other.y1) - max(one.y0, other.y0)
    return across > slack and along > slack
