"""The report of the CFSM recipe: a page of Markdown with its figures, and all numbers as JSON."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ...reporting.page import table
from ..generated import EMBEDDED
from ..report import machine, shown, write_report
from . import figures
from .recipe import Log, Results


def write(results: Results, folder: Path, command: str, seconds: float | None) -> Path:
    """Write cfsm.md, cfsm.json and cfsm-*.png into a folder, and return the page.

    Args:
        command: the command line that the page names.
        seconds: the run's duration; None if it was resumed.
    """
    numbers = measured(results) | {"machine": machine(), "seconds": seconds}
    faces = figures.portraits(results)
    return write_report(
        folder,
        Path(__file__).with_name("cfsm.md"),
        numbers,
        {
            "style": partial(figures.style_losses, results),
            "sweep": partial(figures.strength_sweep, results),
            "similarity": partial(figures.similarity, results),
            "gain": partial(figures.gain, results),
            "guided": partial(figures.guided_losses, results),
            "faces": partial(figures.faces, results, faces),
            "strength": partial(figures.strength, results, faces[:1]),
        },
        results.config,
        command=command,
        **_fields(results, numbers),
    )


def measured(results: Results) -> dict[str, Any]:
    """Return all numbers, for `json.dumps`."""
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
    more = {
        f"{a} above {b}": gain[a] - gain[b]
        for a, b in (("random", "style"), ("guided", "style"), ("guided", "random"))
    }
    above = more["guided above random"]
    return {
        "strengths": results.strengths.tolist(),
        "style": style,
        "similarity": {
            a: dict(zip(results.generators, row, strict=True))
            for a, row in zip(results.generators, results.similarity.tolist(), strict=True)
        },
        "loss": {
            name: {"mean": values.mean().item(), "std": values.std().item()}
            for name, values in (gain | more).items()
        }
        | {"batches": len(above), "batches where guided is above random": int((above > 0).sum())},
        "guided training": {
            variant: {
                "loss, first tenth": _last(rows[: max(2, len(rows) // 10)], "loss"),
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


def _last(rows: Log, name: str) -> float | None:
    """Return the mean of a metric over the last tenth of the steps."""
    values = figures.column(rows[-max(2, len(rows) // 10) :], name)[1]
    return sum(values) / len(values) if values else None


def _stays_below(rows: Log, name: str, limit: float) -> int | None:
    """Return the first step after which no value reaches the limit."""
    above = [row["step"] for row in rows if row[name] >= limit]
    first = int(above[-1]) + 1 if above else 0
    return first if first < len(rows) else None


def _falls(curve: Tensor) -> bool:
    return bool((curve[1:] < curve[:-1]).all())


def _fields(results: Results, numbers: dict[str, Any]) -> dict[str, Any]:
    config, seconds = results.config, numbers["seconds"]
    took = "not measured, since the run was resumed" if seconds is None else f"{seconds:.0f} s"
    yes = {True: "yes", False: "no"}
    middle = len(results.strengths) // 2
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
                shown(x["identity loss, last tenth"]),
                shown(x["anchor, last tenth"], 3),
                ", ".join(f"{x['cosine along the axes'][i]:.3f}" for i in (0, middle, -1)),
                f"{yes[x['mean cosine falls at every step']]}, "
                f"{yes[x['random cosine falls at every step']]}, "
                f"{x['axes along which it falls at every step']} of {config.generator.styles}",
            ]
            for domain, x in numbers["style"].items()
        ],
    )
    loss = numbers["loss"]
    gain = table(
        ["loss of the recognizer", "mean", "standard deviation over batches"],
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
            [variant, *(shown(value, 3) for value in x.values())]
            for variant, x in numbers["guided training"].items()
        ],
    )
    domains = list(next(iter(numbers["verification"].values())))
    verification = table(
        ["ROC-AUC", *domains],
        [
            [variant, *(f"{by[name]['auc']:.4f}" for name in domains)]
            for variant, by in numbers["verification"].items()
        ],
    )
    similar = table(
        ["S(A, B)", *results.generators],
        [
            [a, *(f"{value:.3f}" for value in row.values())]
            for a, row in numbers["similarity"].items()
        ],
    )
    sets = {f.name: getattr(results.people, f.name) for f in fields(results.people)}
    return {
        "took": took,
        "people": results.people,
        "images": {name: len(faces) for name, faces in sets.items()},
        "identities": {name: len(faces.identities) for name, faces in sets.items()},
        "domains": ", ".join(config.domains),
        "steps": len(results.strengths) - 1,
        "loss": loss,
        "style": style,
        "pictured": "generated from eigenfaces" if config.data.faces == EMBEDDED else "held out",
        "similar": similar,
        "gain": gain,
        "training": training,
        "verification": verification,
    }
