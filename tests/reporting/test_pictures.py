"""The plots of recipes, packings and benchmarks: their labels, legends and texts."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from synface.bench import code_report, scale
from synface.evaluation import leak
from synface.recipes.cfsm import figures as cfsm
from synface.recipes.cfsm.measures import STATISTICS
from synface.recipes.cfsm.parts import STRENGTHS
from synface.recipes.hyperface import report as hyperface
from synface.recipes.report import redraw
from synface.synthesis.packing import Packed, bounds
from synface.synthesis.packing import plot as packing

from tests.helpers.command_line import call, refused
from tests.helpers.figures import drawn, legends_on_data, overlapping_texts, unlabeled

RESULTS = Path(__file__).parents[2] / "docs" / "results"
MODULES = {"gap": "gap", "synface": "synface", "hyperface": "hyperface", "study": "synface.study"}
DOMAINS = ("low_resolution", "blurred", "noisy", "dark", "mixed")


def stored(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def check(figure):
    assert unlabeled(figure) == []
    assert legends_on_data(figure) == []
    assert overlapping_texts(figure) == []


@pytest.mark.parametrize("name", MODULES)
def test_pictures_of_the_stored_results_are_drawn_again(name, tmp_path):
    recipe = import_module(f"synface.recipes.{MODULES[name]}")
    shutil.copy(RESULTS / f"{name}.json", tmp_path)
    with drawn() as figures:
        paths = redraw(tmp_path, name, recipe.pictures)
    assert len(figures) == len(paths) == len({*paths}) > 0
    assert all((RESULTS / path.name).exists() and path.exists() for path in paths)
    for figure in figures:
        check(figure)


def test_a_report_is_drawn_again_by_the_command(tmp_path):
    shutil.copy(RESULTS / "synface.json", tmp_path)
    shown = call("recipe", "synface", "--report", tmp_path, "--redraw")
    assert f"drawn: {tmp_path / 'synface-rows.png'}" in shown
    with Image.open(tmp_path / "synface-rows.png") as picture:
        assert min(picture.size) > 300
    text = refused("study", "--report", tmp_path, "--redraw")
    assert f"{tmp_path / 'study.json'} cannot be read: No such file" in text
    (tmp_path / "gap.json").write_text('{"rows": {}}')
    text = refused("recipe", "gap", "--report", tmp_path, "--redraw")
    assert f"{tmp_path / 'gap.json'} is no report of the recipe gap: KeyError" in text
    text = refused("recipe", "gap", "--report", tmp_path, "--redraw", "--quick")
    assert "--quick has no effect with --redraw" in text


def cfsm_results():
    """Return results of the recipe, as far as its plots need them, made up."""
    rng, axes = np.random.default_rng(0), 10
    steps = range(0, 400, 2)
    losses = [
        {
            "step": i,
            "l1": 9 * 0.95**i,
            "identity": rng.random() + 0.01,
            "anchor": 0.1 + rng.random(),
        }
        for i in steps
    ]
    matching = {"W1 ratio": 0.02, "spread ratio": 1.3, "differs": 0.1}
    style = {
        "log": losses,
        "sweep": {"axes": rng.random((axes, 13)).tolist(), "random": rng.random(13).tolist()},
        "measures": {
            "matching": {name: matching | {"differs": i / 10} for i, name in enumerate(STATISTICS)},
            "effects": {name: rng.normal(size=(2, axes)).tolist() for name in STATISTICS},
        },
    }
    log = [{"step": i, "loss": rng.random() + 1} for i in range(100)]
    return SimpleNamespace(
        config=SimpleNamespace(
            domains=DOMAINS, guided=SimpleNamespace(domain="mixed", epsilon=0.314)
        ),
        style=lambda domain: style,
        strengths=STRENGTHS,
        generators=dict.fromkeys(DOMAINS),
        similarity=0.5 + 0.5 * torch.eye(len(DOMAINS) + 1, dtype=torch.float64),
        gain={name: torch.rand(20) + i for i, name in enumerate(("style", "random", "guided"))},
        over_seeds=lambda part: [{"log": log}] * 2,
    )


@pytest.mark.parametrize(
    "name",
    ["style_losses", "strength_sweep", "similarity", "gain", "guided_losses", "matching",
     "effects"],
)  # fmt: skip
def test_plots_of_cfsm(name, tmp_path):
    with drawn() as figures:
        getattr(cfsm, name)(cfsm_results(), tmp_path / "a.png")
    check(figures[0])
    if name == "style_losses":  # the identity loss is not far from its mean
        smooth = [line for line in figures[0].axes[1].lines if line.get_label() in DOMAINS]
        assert len(smooth) == len(DOMAINS)
        assert np.std(smooth[0].get_ydata()) < 0.15


def test_differences_of_cfsm(tmp_path):
    with drawn() as figures:
        cfsm.differences(stored("cfsm"), tmp_path / "a.png")
    check(figures[0])


def test_plots_of_packings(tmp_path):
    rng = np.random.default_rng(0)
    with drawn() as figures:
        packings = []
        for objective in ("lse", "orbit", "hyperface", "cosine"):
            points = torch.from_numpy(rng.normal(size=(60, 8)))
            points /= points.norm(dim=1, keepdim=True)
            history = [(0.1 * i, 25 * i, 0.9 - 0.01 * i) for i in range(9)]
            config = SimpleNamespace(objective=objective, minutes=None)
            packings.append(
                Packed(points, 0.8, (0, 1), bounds.certificate(60, 8)[0], history, config)
            )
        packing.plot(packings, tmp_path / "a.png")
        packing.plot_nearest(torch.rand(60) / 2, 8, tmp_path / "b.png", threshold=0.4)
    for figure in figures:
        check(figure)
    left, right = figures[0].axes
    assert len(right.lines) == 4 + 1  # and the bound
    assert left.get_ylim()[0] == pytest.approx(0.5 / 60 / np.diff(left.patches[0].get_data()[1])[0])


def test_plots_of_benchmarks_and_leaks(tmp_path):
    history = [
        {"step": i, "loss": 9 / (i + 1), "accuracy": i / 100} | dict.fromkeys(scale.PHASES, 0.01)
        for i in range(90)
    ]
    centers = {"num_classes": 10**7, "embedding_size": 512, "dtype": "bfloat16"}
    result = {"history": history, "steps_per_second": 1.5}
    result |= {"config": {"centers": centers, "working_set": 4096}}
    found = leak.Leak(torch.rand(40), torch.rand(200), "another identity", 0.9, 1, [], [])
    with drawn() as figures:
        code_report.plot(stored("codes")["codes"], tmp_path / "a.png")
        scale.write_report(result, tmp_path / "scale")
        leak.write(tmp_path / "leak", found, {}, lambda side, row: {})
    assert len(figures) == 3
    for figure in figures:
        check(figure)


def test_distances_of_hyperface(tmp_path):
    kinds = ("random", "packed", "packed, gallery", "packed by faces")
    values = {kind: [torch.rand(30), torch.rand(30)] for kind in kinds}
    names = ("cosines", "face_cosines", "face_distances", "recognizer_cosines")
    results = SimpleNamespace(config=SimpleNamespace(kinds=kinds), **dict.fromkeys(names, values))
    with drawn() as figures:
        hyperface._distances_plot(results, {"bound": {"cosine": -0.1}}, tmp_path / "a.png")
    check(figures[0])


@pytest.mark.slow
def test_drawing_all_of_a_report_leaves_the_settings_alone(tmp_path):
    settings = {"font.size": 30.0, "lines.linewidth": 9.0, "lines.markersize": 20.0}
    for name in ("plain", "changed"):
        (tmp_path / name).mkdir()
        shutil.copy(RESULTS / "gap.json", tmp_path / name)
        with matplotlib.rc_context(settings if name == "changed" else {}):
            pictures = redraw(tmp_path / name, "gap", import_module("synface.recipes.gap").pictures)
            if name == "changed":
                assert {key: matplotlib.rcParams[key] for key in settings} == settings
    for picture in pictures:
        assert picture.read_bytes() == (tmp_path / "plain" / picture.name).read_bytes()
