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
from .degrade import degrade
from .faces import first_images
from .model import identity_gap
from .recipe import Log, Results

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
    for domain, rows, color in _colored(results.style_log):
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
    for domain, curves, color in _colored(results.sweep):
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
    names, values = list(results.generators), results.similarity.numpy()
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
    """Draw the losses of stage 2, by variant."""
    new, axes = figure(5.6, 3.4)
    shades = (QUIET, INK, ACCENT)
    for (variant, rows), color in zip(results.guided_log.items(), shades, strict=True):
        steps, loss = column(rows, "loss")
        window = max(1, len(loss) // 20)
        smooth = torch.tensor(loss, dtype=torch.float64, device="cpu").unfold(0, window, 1).mean(1)
        axes.plot(steps[window - 1 :], smooth.numpy(), color=color, linewidth=1, label=variant)
    finish(axes, "Stage 2", "step", "loss, running mean")
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
        rows += [degrade(images, domain, random)]
        rows += [generator(images.to(device), 0 * o), generator(images.to(device), o)]
        names += [domain, "o = 0", "o ~ N(0, I)"]
    _grid(rows, names, "Each domain: its degradation, and its generator's images", path)


@torch.no_grad()
def strength(results: Results, image: Tensor, path: Path) -> None:
    """Draw one face with growing strength along each axis of a subspace."""
    domain = results.config.guided.domain
    generator = results.generators[domain]
    strengths = results.strengths[::2].to(generator.space.mean.device)
    images = image.to(strengths.device).expand(len(strengths), -1, -1, -1)
    axes = torch.eye(generator.config.styles, dtype=torch.float32, device=strengths.device)
    rows = [generator(images, strengths[:, None] * axis) for axis in axes]
    names = [f"u{i + 1}" for i in range(len(rows))]
    title = f"{domain}: one face, growing strength ‖o‖ along each axis"
    _grid(rows, names, title, path, [f"{a:g}" for a in strengths.tolist()])


def _grid(
    rows: Sequence[Tensor], names: list[str], title: str, path: Path, columns: Sequence[str] = ()
) -> None:
    image_grid([_pixels(row) for row in rows], names, title, path, columns)


def _pixels(images: Tensor) -> NDArray[np.float32]:
    """Return (N, C, H, W) in [−1, 1] as (N, H, W, C) in [0, 1]."""
    return images.permute(0, 2, 3, 1).cpu().add(1).div(2).clamp(0, 1).numpy()
