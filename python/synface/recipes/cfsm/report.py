"""What the CFSM recipe found: a page of Markdown with its plots, and the figures as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ...common.config import to_toml
from ...common.rng import generator as draws
from ...common.rng import normals
from ...data import normalize
from ...reporting.page import table, write_page
from ...reporting.plots import ACCENT, INK, QUIET, colors, figure, image_grid, save
from ...synthesis.generators import EigenfaceGenerator
from ..sweep import machine
from .degrade import degrade
from .model import identity_gap
from .recipe import EMBEDDED, Results, first_images


def write(results: Results, folder: Path, command: str, seconds: float | None) -> Path:
    """Writes cfsm.md, cfsm.json and cfsm-*.png into a folder; returns the page.

    Args:
        command: what makes this report. seconds: how long it took; None where it was resumed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = measured(results) | {
        "machine": machine(),
        "seconds": seconds,
    }
    _log_plot(results, folder / "cfsm-style.png")
    _sweep_plot(results, folder / "cfsm-sweep.png")
    _similarity_plot(results, folder / "cfsm-similarity.png")
    _gain_plot(results, folder / "cfsm-gain.png")
    _guided_plot(results, folder / "cfsm-guided.png")
    faces = portraits(results)
    _faces_plot(results, faces, folder / "cfsm-faces.png")
    _strength_picture(results, faces[:1], folder / "cfsm-strength.png")
    (folder / "cfsm.json").write_text(json.dumps(figures, indent=1) + "\n")
    page = folder / "cfsm.md"
    write_page(page, _page(results, figures, command))
    return page


def measured(results: Results) -> dict[str, Any]:
    """All figures, for `json.dumps`."""
    style = {}
    for domain, rows in results.style_log.items():
        curves = results.sweep[domain]
        mean = curves["axes"].mean(0)
        style[domain] = {
            "orthogonality l1, first step": rows[0]["l1"],
            "orthogonality l1, last step": rows[-1]["l1"],
            "orthogonality mean square, last step": rows[-1]["mean_square"],
            "first step from which l1 stays below 1e-2": _stays_below(rows, "l1", 1e-2),
            "identity loss, last tenth": _last(rows, "identity"),
            "anchor, last tenth": _last(rows, "anchor"),
            "cosine along the axes": mean.tolist(),
            "cosine along random directions": curves["random"].tolist(),
            "mean cosine falls at every step": _falls(mean),
            "random cosine falls at every step": _falls(curves["random"]),
            "axes along which it falls at every step": sum(map(_falls, curves["axes"])),
        }
    gain = results.gain
    more = gain["guided"] - gain["random"]
    return {
        "strengths": results.strengths.tolist(),
        "style": style,
        "similarity": {
            a: dict(zip(results.painters, row, strict=True))
            for a, row in zip(results.painters, results.similarity.tolist(), strict=True)
        },
        "loss": {name: _spread(values) for name, values in gain.items()}
        | {
            "random above style": _spread(gain["random"] - gain["style"]),
            "guided above style": _spread(gain["guided"] - gain["style"]),
            "guided above random": _spread(more),
            "batches": len(more),
            "batches where guided is above random": int((more > 0).sum()),
        },
        "guided training": {
            variant: {
                "loss, first tenth": _first(rows, "loss"),
                "loss, last tenth": _last(rows, "loss"),
                "accuracy, last tenth": _last(rows, "accuracy"),
            }
            for variant, rows in results.guided_log.items()
        },
        "verification": {
            variant: {name: each.to_json() for name, each in sets.items()}
            for variant, sets in results.verification.items()
        },
    }


def _column(rows: Sequence[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    steps = [row["step"] for row in rows if name in row]
    return steps, [row[name] for row in rows if name in row]


def _last(rows: Sequence[dict[str, float]], name: str) -> float | None:
    values = _column(rows[-max(2, len(rows) // 10) :], name)[1]
    return sum(values) / len(values) if values else None


def _first(rows: Sequence[dict[str, float]], name: str) -> float | None:
    return _last(rows[: max(2, len(rows) // 10)], name)


def _stays_below(rows: Sequence[dict[str, float]], name: str, limit: float) -> int | None:
    """The first step after which no value reaches the limit."""
    above = [row["step"] for row in rows if row[name] >= limit]
    first = int(above[-1]) + 1 if above else 0
    return first if first < len(rows) else None


def _falls(curve: Tensor) -> bool:
    return bool((curve[1:] < curve[:-1]).all())


def _spread(values: Tensor) -> dict[str, float]:
    return {"mean": values.mean().item(), "std": values.std().item()}


def portraits(results: Results, count: int = 6) -> Tensor:
    """(N, C, H, W) faces to show: of nobody (eigenfaces) where the data is the embedded one."""
    data = results.config.data
    if data.faces != EMBEDDED:
        return first_images(results.people.held, count)
    painter = EigenfaceGenerator(64, data.size)
    random = draws(results.config.seed, "portraits", 0)
    who = F.normalize(normals((count, painter.embedding_size), random))
    still = torch.zeros(count, painter.style_size, dtype=torch.float32, device="cpu")
    return normalize(painter.generate(who, still, torch.arange(count, device="cpu")))


# -- plots ---------------------------------------------------------------------------------------


def _log_plot(results: Results, path: Path) -> None:
    new, axes = figure(10.5, 3.2, 1, 3)
    for (domain, rows), color in zip(
        results.style_log.items(), colors(len(results.style_log)), strict=True
    ):
        for ax, name in zip(axes, ("l1", "identity", "anchor"), strict=True):
            ax.plot(*_column(rows, name), color=color, linewidth=0.8, label=domain)
    axes[0].axhline(1e-2, color=ACCENT, linewidth=0.8, linestyle="--")
    titles = ("‖UᵀU − I‖₁; dashed: 1e-2", "identity loss", "anchor: |G(X, 0) − X|")
    for ax, title in zip(axes, titles, strict=True):
        ax.set_yscale("log")
        ax.set_xlabel("step")
        ax.set_title(title, color=INK, fontsize=10)
        ax.grid(alpha=0.25)
    axes[0].set_ylim(bottom=1e-6)
    axes[0].legend(frameon=False, fontsize=8)
    save(new, path)


def _sweep_plot(results: Results, path: Path) -> None:
    new, axes = figure(6.4, 4.4)
    strengths = results.strengths.numpy()
    for (domain, curves), color in zip(
        results.sweep.items(), colors(len(results.sweep)), strict=True
    ):
        axes.plot(strengths, curves["axes"].T.numpy(), color=color, linewidth=0.4, alpha=0.5)
        axes.plot(strengths, curves["axes"].mean(0).numpy(), color=color, linewidth=2, label=domain)
        axes.plot(strengths, curves["random"].numpy(), color=color, linewidth=1, linestyle=":")
    axes.plot(
        strengths,
        1 - identity_gap(results.strengths).numpy(),
        color=ACCENT,
        linestyle="--",
        label="1 − g(a)",
    )
    axes.set_xlabel("strength a = ‖o‖")
    axes.set_ylabel("cosine of f(X) and f(G(X, o))")
    axes.set_title(
        "Strength sweep: each axis, their mean (bold), random (dotted)", color=INK, fontsize=10
    )
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)
    save(new, path)


def _similarity_plot(results: Results, path: Path) -> None:
    new, axes = figure(5.2, 4.6)
    names, values = list(results.painters), results.similarity.numpy()
    axes.imshow(values, cmap="viridis", vmin=values.min(), vmax=1)
    for i in range(len(names)):
        for j in range(len(names)):
            dark = values[i, j] < values.min() + 0.7 * (1 - values.min())
            color = "white" if dark else INK
            axes.text(j, i, f"{values[i, j]:.3f}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title("Similarity of the subspaces, S(A, B)", color=INK, fontsize=10)
    save(new, path)


def _gain_plot(results: Results, path: Path) -> None:
    new, axes = figure(5.6, 3.4)
    gain = results.gain
    for name, color in (("style", QUIET), ("random", INK), ("guided", ACCENT)):
        axes.plot(gain[name].numpy(), "o-", color=color, markersize=3, linewidth=0.8, label=name)
    axes.set_xlabel("batch")
    axes.set_xticks(range(0, len(gain["style"]), 5))
    axes.set_ylabel("recogniser's loss")
    axes.set_title(
        f"At o, o + ε·random signs, and guided; ε = {results.config.guided.epsilon:g}",
        color=INK,
        fontsize=10,
    )
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)
    save(new, path)


def _guided_plot(results: Results, path: Path) -> None:
    new, axes = figure(5.6, 3.4)
    for (variant, rows), color in zip(
        results.guided_log.items(), (QUIET, INK, ACCENT), strict=True
    ):
        steps, loss = _column(rows, "loss")
        window = max(1, len(loss) // 20)
        smooth = torch.tensor(loss, dtype=torch.float64, device="cpu").unfold(0, window, 1).mean(1)
        axes.plot(steps[window - 1 :], smooth.numpy(), color=color, linewidth=1, label=variant)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, running mean")
    axes.set_title("Stage 2", color=INK)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)
    save(new, path)


def _pixels(images: Tensor) -> NDArray[np.float32]:
    """Return (N, C, H, W) in [−1, 1] as (N, H, W, C) in [0, 1]."""
    return images.permute(0, 2, 3, 1).cpu().add(1).div(2).clamp(0, 1).numpy()


@torch.no_grad()
def _faces_plot(results: Results, faces: Tensor, path: Path) -> None:
    rows, names = [faces], ["faces"]
    for domain, painter in results.painters.items():
        device = painter.space.mean.device
        random = draws(results.config.seed, f"shown {domain}", 0)
        o = normals((len(faces), painter.config.styles), random).to(device)
        rows += [degrade(faces, domain, random)]
        rows += [painter(faces.to(device), 0 * o).cpu(), painter(faces.to(device), o).cpu()]
        names += [domain, "o = 0", "o ~ N(0, I)"]
    title = "Each domain: its degradation, and what its generator draws"
    image_grid([_pixels(row) for row in rows], names, title, path)


@torch.no_grad()
def _strength_picture(results: Results, face: Tensor, path: Path) -> None:
    painter = results.painters[results.config.guided.domain]
    strengths = results.strengths[::2].to(painter.space.mean.device)
    images = face.to(strengths.device).expand(len(strengths), -1, -1, -1)
    rows = [
        painter(images, strengths[:, None] * axis)
        for axis in torch.eye(painter.config.styles, dtype=torch.float32, device=strengths.device)
    ]
    names = [f"u{i + 1}" for i in range(len(rows))]
    title = f"{results.config.guided.domain}: one face, ‖o‖ growing along each axis"
    image_grid(list(map(_pixels, rows)), names, title, path, [f"{a:g}" for a in strengths.tolist()])


# -- page ----------------------------------------------------------------------------------------


def _number(value: float | None, digits: int = 4) -> str:
    return "not measured" if value is None else f"{value:.{digits}f}"


def _page(results: Results, figures: dict[str, Any], command: str) -> str:
    config, people = results.config, results.people
    source = people.source
    seconds = figures["seconds"]
    took = "not measured, since the run was resumed" if seconds is None else f"{seconds:.0f} s"
    style = table(
        [
            "domain",
            "L_ort (l1): first, last step",
            "below 1e-2 from step",
            "L_ort (mean square), last",
            "L_id",
            "anchor",
            "cosine at ‖o‖ = 0, 3, 6",
            "falls at every step: mean, random, axes",
        ],
        [
            [
                domain,
                f"{x['orthogonality l1, first step']:.2f}, {x['orthogonality l1, last step']:.1e}",
                str(x["first step from which l1 stays below 1e-2"] or "never"),
                f"{x['orthogonality mean square, last step']:.1e}",
                _number(x["identity loss, last tenth"]),
                _number(x["anchor, last tenth"], 3),
                ", ".join(
                    f"{x['cosine along the axes'][i]:.3f}"
                    for i in (0, len(results.strengths) // 2, -1)
                ),
                f"{_yes(x['mean cosine falls at every step'])}, "
                f"{_yes(x['random cosine falls at every step'])}, "
                f"{x['axes along which it falls at every step']} of {config.generator.styles}",
            ]
            for domain, x in figures["style"].items()
        ],
    )
    loss = figures["loss"]
    gain = table(
        ["loss of the recogniser", "mean", "standard deviation over batches"],
        [
            [text, f"{loss[name]['mean']:.3f}", f"{loss[name]['std']:.3f}"]
            for text, name in (
                ("o ~ N(0, I)", "style"),
                ("o + ε·random signs", "random"),
                ("guided, o*", "guided"),
                ("random − o", "random above style"),
                ("guided − o", "guided above style"),
                ("guided − random", "guided above random"),
            )
        ],
    )
    training = table(
        ["the rest of each batch", "loss, first tenth", "last tenth", "accuracy, last tenth"],
        [
            [
                variant,
                _number(x["loss, first tenth"], 3),
                _number(x["loss, last tenth"], 3),
                _number(x["accuracy, last tenth"], 3),
            ]
            for variant, x in figures["guided training"].items()
        ],
    )
    sets = list(next(iter(figures["verification"].values())))
    verification = table(
        ["ROC-AUC", *sets],
        [
            [variant, *(f"{by[name]['auc']:.4f}" for name in sets)]
            for variant, by in figures["verification"].items()
        ],
    )
    similar = table(
        ["S(A, B)", *results.painters],
        [
            [a, *(f"{value:.3f}" for value in row.values())]
            for a, row in figures["similarity"].items()
        ],
    )
    pictured = "drawn from eigenfaces: nobody's" if config.data.faces == EMBEDDED else "held out"
    return f"""# Controllable and guided face synthesis: what came out

Written by `{command}`; none of the figures is typed in. Time: {took}.
Machine: {figures["machine"]}.

- Train: {len(source)} images of {len(source.identities)} people, {source.source}
- Target domains, once degraded: {len(people.target)} images, {people.target.source}
- Verify: {len(people.held)} images of {len(people.held.identities)} other people

Images are {config.data.size}×{config.data.size}. Domains: {", ".join(config.domains)}.

## Stage 1: style subspaces

{style}

L_id and the anchor (mean |G(X, 0) − X|, pixels in [−1, 1]) are means over the last tenth of the
steps. Cosines are means over one image of each person held out; a curve falls if each of its
{len(results.strengths) - 1} steps from ‖o‖ = 0 to 6 goes down: the mean over the axes u_i,
along a random direction per image, and how many of the axes alone.

![losses of stage 1](cfsm-style.png)

![strength sweep](cfsm-sweep.png)

The faces shown are {pictured}.

![one face, growing strength along each axis](cfsm-strength.png)

![faces, degraded and redrawn](cfsm-faces.png)

## Similarity of the subspaces

Every domain starts from the same parameters; column i is compared with column i.

{similar}

![similarity matrix](cfsm-similarity.png)

## Guided images against random ones

{loss["batches"]} batches of {config.guided.batch_size}, the recogniser before stage 2, styles of
{config.guided.domain}, ε = {config.guided.epsilon:g}. Guided lies above random in
{loss["batches where guided is above random"]} of {loss["batches"]} batches.

{gain}

![losses by batch](cfsm-gain.png)

## Stage 2

{config.guided.originals:.0%} of each batch are originals; the rest stays so (originals), gets a
style o ~ N(0, I) (random), or a guided one. All go on from the same recogniser, for
{config.guided.steps} steps, one seed.

{training}

![stage 2](cfsm-guided.png)

Verification of the people held out, as they are and degraded:

{verification}

## Configuration

```toml
{to_toml(config)}```
"""


def _yes(value: bool) -> str:
    return "yes" if value else "no"
