"""The style of plots, smoothing, training curves, ROC curves, and pictures that never differ."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import combinations
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from synface.reporting import plots

from tests.helpers.figures import drawn, legends_on_data, overlapping_texts, unlabeled

# Linear RGB as protanopes, deuteranopes and tritanopes see it (Machado et al., 2009).
SEEN = {
    "all": np.eye(3),
    "protanopes": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopes": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopes": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}
HOSTILE = {
    "font.size": 30.0, "lines.linewidth": 9.0, "axes.grid": False, "axes.titlesize": 40.0,
    "legend.fontsize": 3.0, "axes.facecolor": "yellow", "savefig.dpi": 33.0,
    "xtick.labelsize": 25.0, "figure.constrained_layout.use": False, "lines.markersize": 20.0,
}  # fmt: skip


def lab(color, seen):
    """Return the CIELAB lightness, a and b of an sRGB color as some people see it."""
    rgb = np.array(matplotlib.colors.to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = to_xyz @ (np.array(seen) @ linear).clip(0, 1) / [0.9505, 1.0, 1.0888]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def history(count, norms=True):
    rng = np.random.default_rng(0)
    rows = []
    for step in range(count):
        row = {"step": step, "epoch": step / 20, "lr": 0.1 * (1 - step / count)}
        row |= {"loss": 20 / (1 + step) + rng.random(), "accuracy": rng.random()}
        rows.append(row | ({"gradient_norm": 1 + 9 * rng.random()} if norms else {}))
    return rows


VERIFIED = [
    {"step": 39, "epoch": 2.0, "auc": 0.8, "accuracy": 0.7, "tar_at_far_0.1": 0.6},
    {"step": 79, "epoch": 4.0, "auc": 0.9, "accuracy": 0.8, "tar_at_far_0.1": 0.7, "seconds": 3.5}
    | {"best": True, "note": "text", "missing": None},
]


def curve(genuine, impostor, seed=0):
    """Return a ROC curve of normal scores."""
    rng = np.random.default_rng(seed)
    scores = np.r_[rng.normal(2, 1, genuine), rng.normal(0, 1, impostor)]
    same = (np.arange(len(scores)) < genuine)[np.argsort(-scores)]
    tpr, fpr = np.cumsum(same) / genuine, np.cumsum(~same) / impostor
    tpr, fpr = np.r_[0, tpr], np.r_[0, fpr]
    return SimpleNamespace(fpr=fpr, tpr=tpr, auc=0.9, genuine=genuine, impostor=impostor)


def two_densities():
    edges = np.linspace(-1, 1, 41)
    middle = (edges[1:] + edges[:-1]) / 2
    return {
        f"at {at}": (np.exp(-((middle - at) ** 2) * 20), edges) for at in (-0.1, 0.4)
    }  # fmt: skip


SCORES = SimpleNamespace(
    edges=two_densities()["at 0.4"][1],
    genuine=two_densities()["at 0.4"][0],
    impostor=two_densities()["at -0.1"][0],
)
FACES = np.linspace(0, 1, 3 * 8 * 6).reshape(3, 8, 6, 1)
PICTURES = {
    "training": lambda path: plots.training_curves(history(200), VERIFIED, path),
    "few steps": lambda path: plots.training_curves(history(5, norms=False), [], path),
    "one step": lambda path: plots.training_curves(history(1), VERIFIED[:1], path),
    "loss": lambda path: plots.loss_curve(history(200), path),
    "roc": lambda path: plots.roc_curves(
        {"network": curve(300, 9000), "raw pixels": curve(300, 9000, 1)}, path, title="ROC"
    ),
    "det": lambda path: plots.roc_curves(
        {f"set {i}": curve(60 * i + 60, 300, i) for i in range(8)}, path, title="DET", det=True
    ),
    "scores": lambda path: plots.score_histogram(
        SCORES, path, genuine=45, impostor=9000, threshold=0.2
    ),
    "densities": lambda path: plots.densities(
        two_densities(), path, title="T", x="cosine", lines={"a": 0.0, "b": 0.9}, log=True
    ),
    "grid": lambda path: plots.image_grid([FACES, FACES[:2]], ["long name", "b"], "T", path, "abc"),
    "pairs": lambda path: plots.image_pairs({"one": [(FACES[0], FACES[1], "0.5")]}, "T", path),
}  # fmt: skip


def settings():
    """Return matplotlib's settings but the backend, which is chosen when it is looked up."""
    return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}


@pytest.mark.parametrize("name", PICTURES)
def test_axes_have_labels_and_legends_are_beside_the_data(name, tmp_path):
    before = settings()
    with drawn() as figures:
        PICTURES[name](tmp_path / "a.png")
    (figure,) = figures
    assert unlabeled(figure) == []
    assert legends_on_data(figure) == []
    assert overlapping_texts(figure) == []
    assert settings() == before


def test_a_figure_without_labels_or_with_a_legend_on_its_data_is_found(tmp_path):
    figure, axes = plots.figure(3, 2)
    axes.plot([0, 1], [0, 1], label="on the data")
    axes.legend(loc="center")
    axes.set_xticks([0, 0.01], ["overlapping", "texts"])
    with drawn():
        plots.save(figure, tmp_path / "a.png")
    assert unlabeled(figure) == [("", "x"), ("", "y")]
    assert legends_on_data(figure) == [["on the data"]]
    assert overlapping_texts(figure) == [("overlapping", "texts")]


@pytest.mark.parametrize("name", ["loss", "roc", "scores", "grid"])
def test_the_users_settings_do_not_change_a_picture(name, tmp_path):
    PICTURES[name](tmp_path / "a.png")
    with matplotlib.rc_context(HOSTILE):
        PICTURES[name](tmp_path / "b.png")
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tmp_path):
    rows = history(200)
    plots.training_curves(rows, VERIFIED, tmp_path / "a.png")
    (tmp_path / "matplotlibrc").write_text("font.size: 30\naxes.facecolor: yellow\n")
    code = """
import json, sys; from pathlib import Path; from synface.reporting.plots import training_curves
training_curves(*json.loads(sys.argv[1]), Path(sys.argv[2]))
assert "matplotlib.pyplot" not in sys.modules  # whose import chooses a backend
"""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([rows, VERIFIED]), tmp_path / "b.png"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "MATPLOTLIBRC": str(tmp_path)},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    written = (tmp_path / "a.png").read_bytes()
    assert written.startswith(b"\x89PNG")
    assert (tmp_path / "b.png").read_bytes() == written


def test_colors_can_be_told_apart_in_grayscale_and_by_the_color_blind():
    cycle = plots.colors(6)
    assert cycle[:2] == [plots.INK, plots.ACCENT]
    for people, seen in SEEN.items():
        for one, other in combinations(cycle, 2):
            difference = lab(one, seen) - lab(other, seen)
            assert np.linalg.norm(difference) > 20, (people, one, other)
            if people == "all":
                assert abs(difference[0]) > 10, (one, other)
    assert len({*plots.colors(12)}) == 12


def test_a_running_mean_is_that_of_a_direct_computation():
    values = np.random.default_rng(0).normal(size=50)
    values[[7, 8, 30]] = np.nan, np.inf, -np.inf
    for window in (1, 3, 9, 99):
        direct = []
        for i in range(len(values)):
            around = values[max(0, i - window // 2) : i + window // 2 + 1]
            around = around[np.isfinite(around)]
            direct.append(around.mean() if len(around) else np.nan)
        np.testing.assert_allclose(plots.running_mean(values, window), direct, atol=1e-12)
    assert plots.running_mean([], 3).shape == (0,)


def test_noisy_curves_are_drawn_pale_below_their_running_mean():
    figure, axes = plots.figure(4, 3)
    y = np.random.default_rng(0).random(400).tolist()
    window = plots.noisy_curve(axes, range(400), y)
    raw, smooth = axes.lines
    assert window == 11
    assert smooth.get_label() == "running mean of 11 steps"
    assert raw.get_alpha() == plots.PALE
    assert raw.get_zorder() < smooth.get_zorder()
    np.testing.assert_array_equal(smooth.get_ydata(), plots.running_mean(y, 11))
    np.testing.assert_array_equal(raw.get_ydata(), y)
    assert plots.noisy_curve(plots.figure(4, 3)[1], range(39), y[:39]) == 1  # drawn as it is


@pytest.mark.slow
def test_training_curves_have_a_panel_for_each_measure(tmp_path):
    with drawn() as figures:
        plots.training_curves(history(200), VERIFIED, tmp_path / "a.png")
        plots.training_curves(history(200, norms=False), [], tmp_path / "b.png")
    full, least = figures
    names = [axes.get_ylabel() for axes in full.axes]
    assert names == [
        "loss (margin cross entropy)", "training top-1", "held-out people", "learning rate",
        "gradient norm",
    ]  # fmt: skip
    assert len(least.axes) == 3
    verified = full.axes[2]
    shown = {line.get_label(): line for line in verified.lines}
    assert list(shown) == ["ROC-AUC", "accuracy", "TAR at FAR 0.1"]  # and no seconds or texts
    assert shown["accuracy"].get_xydata().tolist() == [[2.0, 0.7], [4.0, 0.8]]
    assert len({line.get_marker() for line in verified.lines}) == 3
    assert {axes.get_xlim() for axes in full.axes} == {full.axes[0].get_xlim()}
    assert [text.get_text() for text in full.legends[0].get_texts()] == [
        "each step", "running mean of 5 steps",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="history must have a row or more, got none"):
        plots.training_curves([], [], tmp_path / "c.png")


@pytest.mark.parametrize("det", [False, True])
def test_a_roc_curve_is_dotted_where_few_pairs_decide_and_ends_where_none_does(tmp_path, det):
    with drawn() as figures:
        plots.roc_curves({"a": curve(50, 2000)}, tmp_path / "a.png", title="T", det=det)
    (axes,) = figures[0].axes
    dotted, solid, _ = axes.lines
    corners = []
    for line, style in ((dotted, ":"), (solid, "-")):
        assert line.get_linestyle() == style
        corners.append(axes.transData.inverted().transform(line.get_clip_box().min))
    y = (1 / 50, 10 / 50) if det else (0, 0)
    np.testing.assert_allclose(corners, [(1 / 2000, y[0]), (10 / 2000, y[1])], atol=1e-9)
    assert axes.get_xlim() == (1 / 2000, 1)
    texts = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert texts[0] == "a: area 0.9000, 50 genuine, 2,000 impostor pairs"
    assert texts[1].startswith("uncertain: fewer than 10 false accepts")


@pytest.mark.parametrize("values", [(0.5, 2), (0.02, 0.9), (1e-6, 1), (3, 4)])
def test_logarithmic_axes_have_few_plain_labels(values):
    figure, axes = plots.figure(3, 2)
    axes.plot([0, 1], values)
    plots.log_scale(axes, "y")
    plots.finish(axes, "T", "x", "y")
    figure.draw_without_rendering()
    low, high = axes.get_ylim()
    ticks = axes.yaxis.get_major_ticks()
    texts = [tick.label1.get_text() for tick in ticks if low <= tick.get_loc() <= high]
    assert 2 <= len(texts) <= 8
    if values[1] < 100 * values[0]:
        assert [float(text) for text in texts]  # such as 0.5, not 5×10⁻¹
    assert overlapping_texts(figure) == []


def test_a_threshold_is_a_line_and_may_be_missing(tmp_path):
    with drawn() as figures:
        for threshold in (0.25, None):
            plots.score_histogram(
                SCORES, tmp_path / "a.png", genuine=1, impostor=2, threshold=threshold
            )
    (line,), none = (list(figure.axes[0].lines) for figure in figures)
    assert line.get_xdata() == [0.25, 0.25]
    assert line.get_label() == "threshold 0.250"
    assert none == []
