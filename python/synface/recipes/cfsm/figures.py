"""The figures of the CFSM report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ...common.rng import generator as draws
from ...common.rng import normals
from ...data import normalize
from ...reporting.plots import (
    INK,
    QUIET,
    REFERENCE,
    colors,
    figure,
    finish,
    image_grid,
    log_scale,
    noisy_curve,
    running_mean,
    save,
    styled,
)
from ...synthesis.generators import EigenfaceGenerator
from ..generated import EMBEDDED
from ..report import plot_differences
from .degrade import degrade
from .faces import first_images
from .guided import VARIANTS
from .measures import BOUNDS, DIFFERS, STATISTICS
from .model import identity_gap
from .parts import GUIDED, Part
from .recipe import UNTRAINED, Log, Results, axis_words, sweep

T = TypeVar("T")


def column(rows: Log, name: str) -> tuple[list[float], list[float]]:
    """Return the steps that have a metric, and its values there."""
    steps = [row["step"] for row in rows if name in row]
    return steps, [row[name] for row in rows if name in row]


def _colored(by_domain: dict[str, T]) -> Iterator[tuple[str, T, Any]]:
    yield from zip(by_domain, by_domain.values(), colors(len(by_domain)), strict=True)


@styled()
def style_losses(results: Results, path: Path) -> None:
    """Draw the losses of stage 1, by domain."""
    new, axes = figure(7.2, 8, 3, 1, sharex=True)
    logs = {domain: results.style(domain)["log"] for domain in results.config.domains}
    names = ("l1", "identity", "anchor")
    titles = ("Orthogonality ‖UᵀU − I‖₁", "Identity loss", "Anchor: mean |G(X, 0) − X|")
    for ax, name, title in zip(axes, names, titles, strict=True):
        for domain, rows, color in _colored(logs):
            window = noisy_curve(ax, *column(rows, name), color, domain)
        log_scale(ax, "y")
        finish(ax, title, "step", f"loss, mean of {window} values")
        ax.label_outer()
    axes[0].axhline(1e-2, **REFERENCE, linestyle="--", label="1e-2")
    axes[0].set_ylim(bottom=1e-6)
    finish(axes[0], titles[0])
    save(new, path)


@styled()
def strength_sweep(results: Results, path: Path) -> None:
    """Draw the cosine to the original over the strength: all domains' means, and each domain."""
    strengths, domains = results.strengths.numpy(), results.config.domains
    rows = -(-(1 + len(domains)) // 3)
    new, grid = figure(9.5, 0.8 + 2.6 * rows, rows, 3, sharex=True, sharey=True, squeeze=False)
    every, *each = grid.flat
    gap = 1 - identity_gap(results.strengths).numpy()
    curves_of = {domain: sweep(results.style(domain)) for domain in domains}
    for ax, (domain, curves, color) in zip(each, _colored(curves_of), strict=False):
        along, random = curves["axes"].numpy(), curves["random"].numpy()
        every.plot(strengths, along.mean(0), color=color, label=domain)
        one, *_ = ax.plot(strengths, along.T, color=color, linewidth=0.6, alpha=0.5)
        (mean,) = ax.plot(strengths, along.mean(0), color=color, linewidth=2)
        (dotted,) = ax.plot(strengths, random, color=color, linestyle=":")
        if domain == domains[0]:  # the lines' meaning is the same for all
            one.set_label("along one axis")
            mean.set_label("mean over the axes")
            dotted.set_label("random directions")
    for ax, title in zip((every, *each), ("Means over the axes", *domains), strict=False):
        ax.plot(strengths, gap, **REFERENCE, linestyle="--", label="1 − g(a)")
        finish(ax, title, "strength a = ‖o‖", "cosine of f(X) and f(G(X, o))")
        ax.label_outer()
    for ax in each[len(domains) :]:
        ax.remove()
    save(new, path)


@styled()
def similarity(results: Results, path: Path) -> None:
    """Draw the similarity of every two subspaces as a matrix."""
    new, axes = figure(5.8, 4.6)
    names, values = [*results.generators, UNTRAINED], results.similarity.numpy()
    shown = axes.imshow(values, cmap="viridis", vmin=values.min(), vmax=1)
    for (i, j), value in np.ndenumerate(values):
        dark = value < values.min() + 0.7 * (1 - values.min())
        color = "white" if dark else INK
        axes.text(j, i, f"{value:.3f}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(title="Similarity of the subspaces", xlabel="subspace B", ylabel="subspace A")
    axes.grid(False)
    new.colorbar(shown, label="S(A, B)")
    save(new, path)


@styled()
def gain(results: Results, path: Path) -> None:
    """Draw the recognizer's loss on random and guided styles, by batch."""
    new, axes = figure(6.4, 4)
    epsilon = results.config.guided.epsilon
    names = {
        "style": "style o",
        "random": f"o + ε·random signs, ε = {epsilon:g}",
        "guided": "guided style",
    }
    found = {name: results.gain[name].numpy() for name in names}
    batches = np.arange(len(found["guided"]))
    axes.vlines(batches, found["style"], found["guided"], **REFERENCE)
    for name, color, marker in zip(names, _three(), "os^", strict=True):
        axes.plot(batches, found[name], marker, color=color, label=names[name])
    axes.xaxis.get_major_locator().set_params(integer=True)
    above = int((found["guided"] > found["random"]).sum())
    title = (
        f"Guided styles have a higher loss than random ones in {above} of {len(batches)} batches"
    )
    finish(axes, title, "batch", "recognizer's loss")
    save(new, path)


def _three() -> tuple[Any, Any, Any]:
    """Return the colors of images as they are, in random styles and in guided styles."""
    ink, accent, amber = colors(3)
    return ink, amber, accent


@styled()
def guided_losses(results: Results, path: Path) -> None:
    """Draw the losses of stage 2, by variant; a line for each seed."""
    new, axes = figure(6.4, 4.2)
    for variant, color in zip(VARIANTS, _three(), strict=True):
        for seed, found in enumerate(results.over_seeds(Part(GUIDED, 0, variant))):
            steps, loss = column(found["log"], "loss")
            window = len(loss) // 20 | 1  # odd
            label = None if seed else variant
            axes.plot(steps, running_mean(loss, window), color=color, linewidth=1, label=label)
    axes.set_ylim(bottom=0)
    finish(axes, "Stage 2: a line for each seed", "step", f"loss, mean of {window} steps")
    save(new, path)


def differences(numbers: Mapping[str, Any], path: Path) -> None:
    """Draw what guided images gain over the others, by domain."""
    shown = [name for name in numbers["differences"] if name.startswith("guided")]
    height = len(shown) // 2  # each against originals and random
    new, axes = figure(9.5, 0.5 + 3 * height, height, 2, sharey=True)
    for ax, name in zip(axes.flat, shown, strict=True):
        found = numbers["differences"][name]
        plot_differences(ax, found, "difference in ROC-AUC", name, "verified on")
    for ax in np.atleast_2d(axes)[:, 1]:
        ax.set_ylabel("")  # shared with the left one
    save(new, path)


@styled()
def matching(results: Results, path: Path) -> None:
    """Draw how near statistics are to the target's; hollow: source and target hardly differ."""
    new, axes = figure(9.5, 4, 1, 2)
    domains = results.config.domains
    indices = np.arange(len(STATISTICS))
    for i, (domain, color) in enumerate(zip(domains, colors(len(domains)), strict=True)):
        found = results.style(domain)["measures"]["matching"]
        for index, name in zip(indices, STATISTICS, strict=True):
            at = index + 0.7 * ((i + 0.5) / len(domains) - 0.5)
            differs = found[name]["differs"] >= DIFFERS
            for ax, key in zip(axes, BOUNDS, strict=True):
                look = {"color": color, "fillstyle": "full" if differs else "none"}
                ax.plot(at, max(0.005, found[name][key]), "o", **look)
        axes[0].plot([], [], "o", color=color, label=domain)
    alike = {"color": QUIET, "fillstyle": "none", "label": "source and target hardly differ"}
    axes[0].plot([], [], "o", **alike)
    titles = ("Distance of the statistics to the target's", "Spread of the statistics")
    labels = ("W1 to the target, over the source's", "spread, over the target's")
    for ax, title, label, (least, most) in zip(axes, titles, labels, BOUNDS.values(), strict=True):
        ax.axhline(1.0, **REFERENCE)
        for bound in filter(None, (least, most)):
            ax.axhline(bound, **REFERENCE, linestyle="--", label="bounds")
        ax.set_xticks(indices, STATISTICS)
        log_scale(ax, "y")
        finish(ax, title, "statistic", label, grid="y")
    save(new, path)


@styled()
def effects(results: Results, path: Path) -> None:
    """Draw how each axis of each subspace changes the statistics, as one matrix a domain."""
    domains = results.config.domains
    new, grid = figure(9.5, 1.7 * len(domains) + 0.5, len(domains), 2, squeeze=False)
    for row, domain in zip(grid, domains, strict=True):
        found = results.style(domain)["measures"]["effects"]
        values = np.array([found[name] for name in STATISTICS])  # (statistic, ±, axis)
        most = max(1e-9, np.abs(values).max())
        for i, (ax, sign) in enumerate(zip(row, ("along", "against"), strict=True)):
            shown = ax.imshow(values[:, i], cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
            ax.set_yticks(range(len(STATISTICS)), STATISTICS)
            names = [f"u{j + 1}" for j in range(values.shape[2])]
            ax.set_xticks(range(len(names)), names)
            title = f"{domain}: {sign} each axis, ‖o‖ = 3"
            ax.set(title=title, xlabel="style axis", ylabel="statistic")
            ax.grid(False)
            ax.label_outer()
        new.colorbar(shown, ax=list(row), label="change,\ndeviations")
    save(new, path)


def portraits(results: Results, count: int = 6) -> Tensor:
    """Return (N, C, H, W) faces to show: synthetic ones where the data is the embedded faces."""
    data = results.config.data
    if data.faces != EMBEDDED:
        return first_images(results.people.held, count)
    generator = EigenfaceGenerator(64, data.size)
    random = draws(results.config.seed, "portraits", 0)
    who = F.normalize(normals((count, generator.embedding_size), random))
    still = torch.zeros(count, generator.style_size, dtype=torch.float32, device="cpu")
    return normalize(generator.generate(who, still, torch.arange(count, device="cpu")))


@torch.no_grad()
def faces(results: Results, images: Tensor, path: Path) -> None:
    """Draw faces, degraded as each domain is, and redrawn by its generator."""
    rows, names = [images], ["faces"]
    for domain, generator in results.generators.items():
        device = generator.space.mean.device
        random = draws(results.config.seed, f"shown {domain}", 0)
        o = normals((len(images), generator.config.styles), random).to(device)
        noise = normals(images.shape, random).to(device)
        rows += [degrade(images, domain, random)]
        rows += [generator(images.to(device), each, noise) for each in (0 * o, o)]
        names += [domain, "o = 0", "o ~ N(0, I)"]
    _grid(rows, names, "Each domain: its degradation, and its generator's images", path)


@torch.no_grad()
def strength(results: Results, image: Tensor, path: Path) -> None:
    """Draw one face with growing strength along and against each axis, with the same noise."""
    domain = results.config.guided.domain
    generator = results.generators[domain]
    device = generator.space.mean.device
    half = results.strengths[4::4]
    strengths = torch.cat([-half.flip(0), results.strengths[:1], half]).to(device)
    images = image.to(device).expand(len(strengths), -1, -1, -1)
    noise = normals(image.shape, draws(results.config.seed, "shown noise", 0)).to(device)
    axes = torch.eye(generator.config.styles, dtype=torch.float32, device=device)
    noises = noise.expand_as(images)
    rows = [generator(images, strengths[:, None] * axis, noises) for axis in axes]
    does = axis_words(results.style(domain))
    names = [f"u{i + 1}: {less} | {more}" for i, (more, less) in enumerate(does)]
    title = f"{domain}: one face, o against (−) and along (+) each axis"
    _grid(rows, names, title, path, [f"{a:+g}" if a else "0" for a in strengths.tolist()])


def _grid(
    rows: Sequence[Tensor], names: list[str], title: str, path: Path, columns: Sequence[str] = ()
) -> None:
    image_grid([_pixels(row) for row in rows], names, title, path, columns)


def _pixels(images: Tensor) -> NDArray[np.float32]:
    """Return (N, C, H, W) in [−1, 1] as (N, H, W, C) in [0, 1]."""
    return images.permute(0, 2, 3, 1).cpu().add(1).div(2).clamp(0, 1).numpy()
