"""The report of the CFSM recipe: a page of Markdown with its figures, and all numbers as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ...common.durations import duration
from ...reporting.page import table
from ..generated import EMBEDDED
from ..report import (
    difference,
    shown,
    shown_difference,
    spread,
    verdict,
    write_report,
)
from . import figures
from .config import CfsmConfig, described
from .measures import BOUNDS, DIFFERS, LITTLE, STATISTICS
from .parts import RECOGNIZER, Part, guided_parts
from .recipe import UNTRAINED, Log, Results, axis_words, sweep

MEAN = "mean over the domains"
ANCHOR = "anchor, last tenth"


def write(results: Results, folder: Path, command: str, seconds: float | None) -> Path:
    """Write cfsm.md, cfsm.json and cfsm-*.png into a folder, and return the page.

    Args:
        command: the command line that the page names.
        seconds: the run's duration; None if it was resumed.
    """
    numbers = measured(results) | {"machine": results.machine(), "seconds": seconds}
    faces = figures.portraits(results)
    return write_report(
        folder,
        Path(__file__).with_name("cfsm.md"),
        numbers,
        {
            "style": partial(figures.style_losses, results),
            "matching": partial(figures.matching, results),
            "sweep": partial(figures.strength_sweep, results),
            "effects": partial(figures.effects, results),
            "similarity": partial(figures.similarity, results),
            "gain": partial(figures.gain, results),
            "guided": partial(figures.guided_losses, results),
            "differences": partial(figures.differences, numbers),
            "faces": partial(figures.faces, results, faces),
            "strength": partial(figures.strength, results, faces[:1]),
        },
        results.config,
        command=command,
        **_fields(results, numbers),
    )


def measured(results: Results) -> dict[str, Any]:
    """Return all numbers, for `json.dumps`."""
    config, styles = results.config, {}
    for domain in config.domains:
        styles[domain] = _style(results, domain, 0)
    gain = results.gain
    more = {
        f"{a} above {b}": gain[a] - gain[b]
        for a, b in (("random", "style"), ("guided", "style"), ("guided", "random"))
    }
    above = more["guided above random"]
    names = [*config.domains, UNTRAINED]
    return {
        "strengths": results.strengths.tolist(),
        "style": styles,
        "further seeds": [
            _style(results, config.guided.domain, seed) for seed in range(1, config.style.seeds)
        ],
        "without": {described(name): _measures(found) for name, found in results.ablations.items()},
        "similarity": {
            a: dict(zip(names, row, strict=True))
            for a, row in zip(names, results.similarity.tolist(), strict=True)
        },
        "loss": {
            name: {"mean": values.mean().item(), "std": values.std().item()}
            for name, values in (gain | more).items()
        }
        | {"batches": len(above), "batches where guided is above random": int((above > 0).sum())},
    } | _stage_2(results)


def _style(results: Results, domain: str, seed: int) -> dict[str, Any]:
    """Return the numbers of a style space."""
    found = results.style(domain, seed)
    rows, curves = found["log"], sweep(found)
    mean = curves["axes"].mean(0)
    return {
        "orthogonality l1, first step": rows[0]["l1"],
        "orthogonality l1, last step": rows[-1]["l1"],
        "orthogonality mean square, last step": rows[-1]["mean_square"],
        "first step from which l1 stays below 1e-2": _stays_below(rows, "l1", 1e-2),
        "identity loss, last tenth": _last(rows, "identity"),
        "cosine along the axes": mean.tolist(),
        "cosine along random directions": curves["random"].tolist(),
        "mean cosine falls at every step": _falls(mean),
        "random cosine falls at every step": _falls(curves["random"]),
        "axes along which it falls at every step": sum(map(_falls, curves["axes"])),
    } | _measures(found)


def _measures(found: dict[str, Any]) -> dict[str, Any]:
    """Return the measures of a style space, its axes' words, and its anchor loss."""
    return found["measures"] | {
        "words": axis_words(found),
        ANCHOR: _last(found["log"], "anchor"),
    }


def _stage_2(results: Results) -> dict[str, Any]:
    """Return the numbers of stage 2, over its seeds."""

    def over_seeds(parts: list[dict[str, Any]]) -> dict[str, Any]:
        sets = parts[0]["verification"]
        return {
            name: {
                key: spread([part["verification"][name][key] for part in parts])
                for key in ("auc", "accuracy")
            }
            for name in sets
        }

    verified = {"before": over_seeds(results.over_seeds(Part(RECOGNIZER, 0)))}
    trained, differences = {}, {}
    for part in guided_parts(results.config):
        name, found = _named(part), results.over_seeds(part)
        verified[name] = over_seeds(found)
        logs = [each["log"] for each in found]
        first, last = [x[: _tenth(x)] for x in logs], [x[-_tenth(x) :] for x in logs]
        trained[name] = {
            "loss, first tenth": _over(first, "loss"),
            "loss, last tenth": _over(last, "loss"),
            "accuracy, last tenth": _over(last, "accuracy"),
        }
        random = _named(replace(part, name="random", epsilon=None))
        against = {"guided": ["originals", random], "random": ["originals"]}
        for other in against.get(part.name, ["before"]):
            differences[f"{name} − {other}"] = _over_domains(verified[name], verified[other])
    return {"guided training": trained, "verification": verified, "differences": differences}


def _named(part: Part) -> str:
    """Return the name of a network of stage 2 in the report."""
    name = part.name
    if part.originals is not None:
        name += f", {100 * part.originals:g}% originals"
    if part.epsilon is not None:
        name += f", ε = {part.epsilon:g}"
    return name


def _over_domains(of: dict[str, Any], less: dict[str, Any]) -> dict[str, Any]:
    """Return the paired differences in ROC-AUC by domain, and of the mean over the domains."""
    found = {name: difference(of[name]["auc"], less[name]["auc"]) for name in of}
    domains = [name for name in of if name != "clean"]

    def mean(sets: dict[str, Any]) -> dict[str, Any]:
        values = zip(*(sets[name]["auc"]["values"] for name in domains), strict=True)
        return spread([sum(each) / len(each) for each in values])

    return found | {MEAN: difference(mean(of), mean(less))}


def _over(logs: list[Log], name: str) -> dict[str, Any]:
    """Return the `spread` over logs of the mean of a metric that every row has."""
    return spread([sum(row[name] for row in rows) / len(rows) for rows in logs])


def _tenth(rows: Log) -> int:
    return max(2, len(rows) // 10)


def _last(rows: Log, name: str) -> float | None:
    """Return the mean of a metric over the last tenth of the steps."""
    values = figures.column(rows[-_tenth(rows) :], name)[1]
    return sum(values) / len(values) if values else None


def _stays_below(rows: Log, name: str, limit: float) -> int | None:
    """Return the first step after which no value reaches the limit."""
    above = [row["step"] for row in rows if row[name] >= limit]
    first = int(above[-1]) + 1 if above else 0
    return first if first < len(rows) else None


def _falls(curve: Tensor) -> bool:
    return bool((curve[1:] < curve[:-1]).all())


def _fields(results: Results, numbers: dict[str, Any]) -> dict[str, Any]:
    config, spaces = results.config, _spaces(results.config, numbers)
    sets = {f.name: getattr(results.people, f.name) for f in fields(results.people)}
    return {
        "took": "not measured, since it was resumed"
        if numbers["seconds"] is None
        else duration(numbers["seconds"]),
        "people": results.people,
        "images": {name: len(faces) for name, faces in sets.items()},
        "identities": {name: len(faces.identities) for name, faces in sets.items()},
        "domains": ", ".join(config.domains),
        "steps": len(results.strengths) - 1,
        "loss": numbers["loss"],
        "style": _style_table(config, spaces, numbers["strengths"]),
        "control": _control_table(spaces),
        "matching": _matching_table(spaces),
        "matched": _matched(spaces),
        "ablations": _ablation_section(config, numbers),
        "axes": _axes_table(spaces),
        "little": f"{LITTLE}: below {DIFFERS}",
        "share": f"{100 * config.guided.originals:g}%",
        "reference": "degraded images of the same people, drawn independently"
        if config.data.target == EMBEDDED
        else "the target images, which stage 1 has seen",
        "pictured": "generated from eigenfaces" if config.data.faces == EMBEDDED else "held out",
        "similar": _similarity_table(numbers["similarity"]),
        "gain": _gain_table(numbers["loss"]),
        "training": _training_table(numbers["guided training"]),
        "verification": _verification_table(numbers["verification"]),
        "differences": _difference_table(numbers["differences"]),
        "conclusions": conclusions(numbers),
        "recognizers": plural(config.guided.seeds, "recognizer"),
        "spaces": plural(len(spaces), "style space"),
    }


def _spaces(config: CfsmConfig, numbers: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the numbers of every style space; those of the guided domain are named by seed."""
    found = {}
    for domain, first in numbers["style"].items():
        if domain == config.guided.domain and numbers["further seeds"]:
            for seed, each in enumerate([first, *numbers["further seeds"]]):
                found[f"{domain}, seed {config.seed + seed}"] = each
        else:
            found[domain] = first
    return found


def plural(count: int, noun: str) -> str:
    """Return a number and its noun."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _style_table(config: CfsmConfig, spaces: dict[str, Any], strengths: list[float]) -> str:
    yes, at = {True: "yes", False: "no"}, (0, len(strengths) // 2, -1)
    return table(
        [
            "domain",
            "L_ort (l1): first, last step",
            "below 1e-2 from step",
            "L_ort (mean square), last",
            "L_id",
            "anchor",
            f"cosine at ‖o‖ = {', '.join(f'{strengths[i]:g}' for i in at)}",
            "falls at every step: mean, random, axes",
        ],
        [
            [
                name,
                f"{x['orthogonality l1, first step']:.2f}, {x['orthogonality l1, last step']:.1e}",
                _step(x["first step from which l1 stays below 1e-2"]),
                f"{x['orthogonality mean square, last step']:.1e}",
                shown(x["identity loss, last tenth"]),
                shown(x[ANCHOR], 3),
                ", ".join(f"{x['cosine along the axes'][i]:.3f}" for i in at),
                f"{yes[x['mean cosine falls at every step']]}, "
                f"{yes[x['random cosine falls at every step']]}, "
                f"{x['axes along which it falls at every step']} of {config.generator.styles}",
            ]
            for name, x in spaces.items()
        ],
    )


def _step(number: int | None) -> str:
    return "never" if number is None else str(number)


def _control_table(spaces: dict[str, Any]) -> str:
    keys = ("axis cosine", "opposite cosine", "direction share", "recovery R²")
    return table(
        ["domain", *keys],
        [
            [name, *(shown(found["controllability"][key], 2) for key in keys)]
            for name, found in spaces.items()
        ],
    )


def _matching_table(spaces: dict[str, Any]) -> str:
    def cell(found: dict[str, float]) -> str:
        return (
            f"{found['W1 ratio']:.2f}, {found['spread ratio']:.2f} "
            f"({found['differs']:.2f}, {found['spread ratio of source']:.2f})"
        )

    return table(
        ["domain", *STATISTICS],
        [[d, *(cell(x["matching"][name]) for name in STATISTICS)] for d, x in spaces.items()],
    )


def _ablation_section(config: CfsmConfig, numbers: dict[str, Any]) -> str:
    """Return the section about the additions, or no text where none was left out."""
    if not numbers["without"]:
        return ""
    domain, keys = config.guided.domain, ("axis cosine", "direction share", "recovery R²")
    rows = {"with all": numbers["style"][domain]} | {
        f"`{setting}`": found for setting, found in numbers["without"].items()
    }
    ablated = table(
        [domain, *keys, "anchor", *STATISTICS],
        [
            [
                name,
                *(shown(x["controllability"][key], 2) for key in keys),
                shown(x[ANCHOR], 3),
                *(
                    f"{found['W1 ratio']:.2f}, {found['spread ratio']:.2f}"
                    for found in (x["matching"][name] for name in STATISTICS)
                ),
            ]
            for name, x in rows.items()
        ],
    )
    return f"""## What each addition gains

Each row has the paper's value of one of them, and the last of all; seed {config.seed} alone. Of a
statistic: W1 ratio, spread ratio.

{ablated}
"""


def _axes_table(spaces: dict[str, Any]) -> str:
    """Return what the axes do, and how often, counted over both directions of each."""
    counts = {d: Counter(word for both in x["words"] for word in both) for d, x in spaces.items()}
    axes = range(len(next(iter(spaces.values()))["words"]))
    return table(
        ["domain", "its axes", *(f"u{i + 1}" for i in axes)],
        [
            [
                domain,
                ", ".join(f"{word} {count}×" for word, count in counts[domain].most_common()),
                *(" / ".join(both) for both in x["words"]),
            ]
            for domain, x in spaces.items()
        ],
    )


def _matched(spaces: dict[str, Any]) -> str:
    """Return a sentence about the statistics in which targets differ from the source."""
    found = {
        f"{name} of {domain}": x["matching"][name]
        for domain, x in spaces.items()
        for name in STATISTICS
        if x["matching"][name]["differs"] >= DIFFERS
    }
    missed = [
        f"{name} (W1 ratio {x['W1 ratio']:.2f}, spread ratio {x['spread ratio']:.2f})"
        for name, x in found.items()
        if any(not least <= x[key] <= most for key, (least, most) in BOUNDS.items())
    ]
    (_, nearest), (least, most) = BOUNDS["W1 ratio"], BOUNDS["spread ratio"]
    text = (
        f"Over all style spaces, there are {len(found)} statistics in which a target differs from "
        f"the source by {DIFFERS} standard deviations or more. Of them, {len(found) - len(missed)} "
        f"have a W1 ratio of at most {nearest:g} and a spread ratio within {least:g} and {most:g}"
    )
    return f"{text}; not: {'; '.join(missed)}." if missed else f"{text}."


def _similarity_table(similarity: dict[str, dict[str, float]]) -> str:
    return table(
        ["S(A, B)", *similarity],
        [[a, *(f"{value:.3f}" for value in row.values())] for a, row in similarity.items()],
    )


def _gain_table(loss: dict[str, Any]) -> str:
    return table(
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


def _training_table(trained: dict[str, Any]) -> str:
    return table(
        ["the rest of each batch", "loss, first tenth", "last tenth", "accuracy, last tenth"],
        [[variant, *(shown(value, 3) for value in x.values())] for variant, x in trained.items()],
    )


def _verification_table(verified: dict[str, Any]) -> str:
    domains = list(verified["before"])
    return table(
        ["ROC-AUC", *domains],
        [
            [variant, *(shown(by[name]["auc"]) for name in domains)]
            for variant, by in verified.items()
        ],
    )


def _difference_table(differences: dict[str, Any]) -> str:
    domains = list(next(iter(differences.values())))
    return table(
        ["difference in ROC-AUC, seed by seed", *domains],
        [
            [
                name,
                *(f"{shown_difference(by[domain])}: {verdict(by[domain])}" for domain in domains),
            ]
            for name, by in differences.items()
        ],
    )


def conclusions(numbers: dict[str, Any]) -> str:
    """Return what the intervals say of the mean over the domains, as a Markdown list."""
    lines = []
    for name, by in numbers["differences"].items():
        of, less = name.split(" − ")
        resolved = [
            f"{domain} {verdict(found)}"
            for domain, found in by.items()
            if domain != MEAN and verdict(found) in ("higher", "lower")
        ]
        lines.append(
            f"- *{of}* against *{less}*, {MEAN}: {verdict(by[MEAN])} "
            f"({shown_difference(by[MEAN])}); resolved: {', '.join(resolved) or 'none'}."
        )
    return "\n".join(lines)
