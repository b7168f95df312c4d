"""The figures of the CFSM report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from ...reporting.plots import ACCENT, INK, QUIET, colors, figure, finish, image_grid, save
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


def style_losses(results: Results, path: Path) -> None:
    """Draw the losses of stage 1, by domain."""
    new, axes = figure(10.5, 3.2, 1, 3)
    logs = {domain: results.style(domain)["log"] for domain in results.config.domains}
    for domain, rows, color in _colored(logs):
        for ax, name in zip(axes, ("l1", "identity", "anchor"), strict=True):
            ax.plot(*column(rows, name), color=color, linewidth=0.8, label=domain)
    axes[0].axhline(1e-2, color=ACCENT, linewidth=0.8, linestyle="--")
    titles = ("Orthogonality ‖UᵀU − I‖₁; dashed: 1e-2", "Identity loss", "Anchor: |G(X, 0) − X|")
    for ax, title in zip(axes, titles, strict=True):
        ax.set_yscale("log")
        finish(ax, title, "step", "loss")
    axes[0].set_ylim(bottom=1e-6)
    save(new, path)


def strength_sweep(results: Results, path: Path) -> None:
    """Draw the cosine to the original over the strength, by domain."""
    new, axes = figure(6.4, 4.4)
    strengths = results.strengths.numpy()
    curves_of = {domain: sweep(results.style(domain)) for domain in results.config.domains}
    for domain, curves, color in _colored(curves_of):
        axes.plot(strengths, curves["axes"].T.numpy(), color=color, linewidth=0.4, alpha=0.5)
        axes.plot(strengths, curves["axes"].mean(0).numpy(), color=color, linewidth=2, label=domain)
        axes.plot(strengths, curves["random"].numpy(), color=color, linewidth=1, linestyle=":")
    gap = 1 - identity_gap(results.strengths).numpy()
    axes.plot(strengths, gap, color=ACCENT, linestyle="--", label="1 − g(a)")
    title = "Style strength: each axis, their mean (bold), random (dotted)"
    finish(axes, title, "strength a = ‖o‖", "cosine of f(X) and f(G(X, o))")
    save(new, path)


def similarity(results: Results, path: Path) -> None:
    """Draw the similarity of every two subspaces as a matrix."""
    new, axes = figure(5.2, 4.6)
    names, values = [*results.generators, UNTRAINED], results.similarity.numpy()
    axes.imshow(values, cmap="viridis", vmin=values.min(), vmax=1)
    for (i, j), value in np.ndenumerate(values):
        dark = value < values.min() + 0.7 * (1 - values.min())
        color = "white" if dark else INK
        axes.text(j, i, f"{value:.3f}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title("Similarity of the subspaces, S(A, B)", color=INK, fontsize=10)
    save(new, path)


def gain(results: Results, path: Path) -> None:
    """Draw the recognizer's loss on random and guided styles, by batch."""
    new, axes = figure(5.6, 3.4)
    for name, color in (("style", QUIET), ("random", INK), ("guided", ACCENT)):
        values = results.gain[name].numpy()
        axes.plot(values, "o-", color=color, markersize=3, linewidth=0.8, label=name)
    axes.set_xticks(range(0, len(values), 5))
    epsilon = results.config.guided.epsilon
    title = f"Style o, o + ε·random signs, and guided; ε = {epsilon:g}"
    finish(axes, title, "batch", "recognizer's loss")
    save(new, path)


def guided_losses(results: Results, path: Path) -> None:
    """Draw the losses of stage 2, by variant; a line for each seed."""
    new, axes = figure(5.6, 3.4)
    for variant, color in zip(VARIANTS, (QUIET, INK, ACCENT), strict=True):
        for seed, found in enumerate(results.over_seeds(Part(GUIDED, 0, variant))):
            steps, loss = column(found["log"], "loss")
            window = max(1, len(loss) // 20)
            values = torch.tensor(loss, dtype=torch.float64, device="cpu")
            smooth = values.unfold(0, window, 1).mean(1).numpy()
            label = None if seed else variant
            axes.plot(steps[window - 1 :], smooth, color=color, linewidth=0.9, label=label)
    finish(axes, "Stage 2, each seed", "step", "loss, running mean")
    save(new, path)


def differences(numbers: dict[str, Any], path: Path) -> None:
    """Draw what guided images gain over the others, by domain."""
    shown = [name for name in numbers["differences"] if name.startswith("guided")]
    height = len(shown) // 2  # each against originals and random
    new, axes = figure(12.0, 3.4 * height, height, 2)
    for ax, name in zip(axes.flat, shown, strict=True):
        plot_differences(ax, numbers["differences"][name], "difference in ROC-AUC", name)
    save(new, path)


def matching(results: Results, path: Path) -> None:
    """Draw how near statistics are to the target's; hollow: source and target hardly differ."""
    new, axes = figure(10.5, 3.4, 1, 2)
    domains = results.config.domains
    indices = np.arange(len(STATISTICS))
    for i, (domain, color) in enumerate(zip(domains, colors(len(domains)), strict=True)):
        found = results.style(domain)["measures"]["matching"]
        for index, name in zip(indices, STATISTICS, strict=True):
            at = index + 0.7 * ((i + 0.5) / len(domains) - 0.5)
            differs = found[name]["differs"] >= DIFFERS
            for ax, key in zip(axes, BOUNDS, strict=True):
                look = {"color": color, "markersize": 6, "fillstyle": "full" if differs else "none"}
                label = None if index else domain
                ax.plot(at, max(0.005, found[name][key]), "o", label=label, **look)
    titles = ("W1 to the target, over the source's", "Spread, over the target's")
    for ax, title, (least, most) in zip(axes, titles, BOUNDS.values(), strict=True):
        ax.axhline(1.0, color=QUIET, linewidth=0.8)
        for bound in filter(None, (least, most)):
            ax.axhline(bound, color=QUIET, linewidth=0.8, linestyle="--")
        ax.set_yscale("log")
        ax.set_xticks(indices, STATISTICS)
        finish(ax, title, grid="y")
    save(new, path)


def effects(results: Results, path: Path) -> None:
    """Draw how each axis of each subspace changes the statistics, as one matrix a domain."""
    domains = results.config.domains
    new, axes = figure(10.0, 1.5 * len(domains) + 0.5, len(domains), 2)
    grid = np.atleast_2d(axes)
    for row, domain in zip(grid, domains, strict=True):
        found = results.style(domain)["measures"]["effects"]
        values = np.array([found[name] for name in STATISTICS])  # (statistic, ±, axis)
        most = max(1e-9, np.abs(values).max())
        for i, (ax, sign) in enumerate(zip(row, ("along", "against"), strict=True)):
            ax.imshow(values[:, i], cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
            ax.set_yticks(range(len(STATISTICS)), STATISTICS, fontsize=7)
            names = [f"u{j + 1}" for j in range(values.shape[2])]
            ax.set_xticks(range(len(names)), names, fontsize=7)
            title = (
                f"{domain}: {sign} each axis, ‖o‖ = 3 (red: more; full at {most:.1f} deviations)"
            )
            ax.set_title(title, color=INK, fontsize=8)
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
