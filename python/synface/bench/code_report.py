"""The packer against the best known spherical codes: its runs, and their report."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from synface_kernels import _env

from ..common.files import write_text
from ..common.textfiles import read_json
from ..reporting.page import table, write_page
from ..reporting.plots import ACCENT, INK, REFERENCE, figure, finish, log_scale, save, styled
from ..synthesis.packing import PackConfig, Packer, PackingProgress, bounds
from .codes import KnownCode

LEVELS = (1e-4, 1e-6, 1e-9)  # excess over the best known cosine below which a code counts as found
FLOOR = 1e-16  # of the plot: an excess of 0 or less is drawn here
NAME = "codes"


def configuration(code: KnownCode, seed: int) -> PackConfig:
    """Return the configuration of a run: the packer's defaults."""
    return PackConfig(code.count, code.dim, seed=seed)


def measure(
    code: KnownCode,
    seeds: Sequence[int],
    progress: AbstractContextManager[PackingProgress] | None = None,
) -> dict[str, Any]:
    """Pack a code's points once for each seed, and return the best, ready for `json.dumps`."""
    runs: list[dict[str, Any]] = []
    with progress or nullcontext() as bar:
        for seed in seeds:
            began = time.perf_counter()
            packed = Packer(configuration(code, seed)).run(progress=bar)
            seconds = time.perf_counter() - began
            runs.append({"seed": seed, "cosine": packed.worst, "seconds": seconds})
    best = min(runs, key=lambda run: run["cosine"])
    bound = bounds.certificate(code.count, code.dim)[0]
    return {
        **asdict(code),
        "found": best["cosine"],
        "excess": best["cosine"] - code.cosine,
        "seed": best["seed"],
        "seconds": sum(run["seconds"] for run in runs),
        "bound": bound._asdict(),
        "gap": best["cosine"] - bound.cosine,
        "runs": runs,
        "config": _settings(code),
    }


def _settings(code: KnownCode) -> dict[str, Any]:
    """Return the packer's settings but the seed, as they come back from JSON."""
    settings = json.loads(json.dumps(asdict(configuration(code, 0))))
    del settings["seed"]
    return dict(settings)


def summary(row: Mapping[str, Any]) -> str:
    """Return a code's result as a line of text."""
    return (
        f"{row['count']} points in {row['dim']} dimensions: {row['found']:.10f}, "
        f"best known {row['cosine']:.10f}, excess {row['excess']:.1e}; at least "
        f"{row['bound']['cosine']:.6f} ({row['bound']['name']}); "
        f"seed {row['seed']}, {row['seconds']:.1f} s"
    )


def conclusion(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return how many codes were found, to each of `LEVELS`."""
    reached = (sum(row["excess"] <= level for row in rows) for level in LEVELS)
    found = ", ".join(f"{n} to {level:g}" for n, level in zip(reached, LEVELS, strict=True))
    return f"Of {len(rows)} codes the packer finds {found}, in {_total(rows):.0f} s."


def _total(rows: Sequence[Mapping[str, Any]]) -> float:
    return float(sum(row["seconds"] for row in rows))


def check_new(folder: Path) -> None:
    """Raise FileExistsError if a folder has a report."""
    file = folder / f"{NAME}.json"
    if file.exists():
        raise FileExistsError(
            f"{file} exists: --resume adds the codes it lacks, --overwrite replaces it"
        )


def read(folder: Path, codes: Sequence[KnownCode], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Return the rows of a folder's report, of whichever codes it has.

    Raises:
        ValueError: if it has none, is damaged, or is of other seeds, settings of the packer or
            known cosines than the codes' are now.
    """
    file = folder / f"{NAME}.json"
    if not file.exists():
        raise ValueError(f"{file} does not exist: there is nothing to resume")
    content = read_json(file)
    try:
        rows = list(content["codes"])
        for row in rows:
            summary(row)
            for code in codes:
                if (row["count"], row["dim"]) != (code.count, code.dim):
                    continue
                now = [code.cosine, list(seeds), _settings(code)]
                then = [row["cosine"], [run["seed"] for run in row["runs"]], row["config"]]
                names = ("the best known cosine", "the seeds", "the packer's settings")
                for name, a, b in zip(names, then, now, strict=True):
                    if a != b:
                        raise ValueError(
                            f"{file}: {name} of {code.count},{code.dim} were {a}, and are {b} "
                            "now: --overwrite replaces the report"
                        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no report of `synface bench codes`: {error!r}") from error
    return rows


def write(rows: Sequence[Mapping[str, Any]], folder: Path, command: str) -> Path:
    """Write codes.json, codes.md and codes-excess.png, and return the page.

    The JSON is the first, and is replaced atomically, so that nothing measured is lost.

    Args:
        command: the command line that the page names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = sorted(rows, key=lambda row: (row["dim"], row["count"]))
    machine = (
        f"{_env.processor()}, threads: {torch.get_num_threads()}, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )
    result = {"command": command, "machine": machine, "codes": rows}
    write_text(folder / f"{NAME}.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    plot(rows, folder / f"{NAME}-excess.png")
    text = f"""# Known spherical codes: results

Written by `{command}`, all numbers included. Measured on {machine}.

For each of the best known codes, N points are packed in d dimensions with the packer's defaults.
The excess is the worst cosine found less the best known one; a negative one of some 1e-16 is
rounding. The bound is the highest that is known here of all codes of that size, the gap the worst
cosine less the bound.

{conclusion(rows)}

{_table(rows)}

![excess over the best known cosine]({NAME}-excess.png)
"""
    page = folder / f"{NAME}.md"
    write_page(page, text)
    return page


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["N", "d", "best known", "found", "excess", "bound", "gap", "seed", "s", "source"]
    return table(
        head,
        [
            [
                str(row["count"]),
                str(row["dim"]),
                f"{row['cosine']:.8f}",
                f"{row['found']:.8f}",
                f"{row['excess']:.1e}",
                f"{row['bound']['cosine']:.6f} ({row['bound']['name']})",
                f"{row['gap']:.1e}",
                str(row["seed"]),
                f"{row['seconds']:.1f}",
                row["source"],
            ]
            for row in rows
        ],
    )


@styled()
def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot each code's excess over the best known cosine, logarithmically."""
    new, axes = figure(7.2, 1.6 + 0.17 * len(rows))
    places = range(len(rows))
    excess = [max(row["excess"], FLOOR) for row in rows]
    for level in LEVELS:
        levels = "levels " + ", ".join(f"{level:g}" for level in LEVELS)
        axes.axvline(level, **REFERENCE, linestyle=":", label=levels)
    found = [value <= LEVELS[1] for value in excess]
    for reached, color, marker, label in (
        (True, INK, "o", "found"),
        (False, ACCENT, "s", "not found"),
    ):
        chosen = [i for i in places if found[i] == reached]
        if chosen:
            label = f"{label} to {LEVELS[1]:g}: {len(chosen)}"
            axes.plot([excess[i] for i in chosen], chosen, marker, color=color, label=label)
    axes.set_xlim(FLOOR / 2, 1)
    log_scale(axes, "x")
    axes.set_yticks(places, [f"{row['count']} in {row['dim']}" for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first on top
    title = f"The packer finds {sum(found)} of {len(rows)} codes to {LEVELS[1]:g}"
    x = f"worst cosine above the best known; {FLOOR:g} stands for none"
    finish(axes, title, x, "N points in d dimensions", grid="both")
    save(new, path)
