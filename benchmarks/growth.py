"""Growth of the time of our ops and of their floors: over classes, batch, points and images.

`python -m benchmarks.growth` verifies the ops, measures every series, and writes
benchmarks/results/growth/<machine>.json with the fitted exponents; `python -m benchmarks.table`
puts them into the documentation. With `--series` the file's other series are kept.

Until all is measured, the results are in a file of the same name and `.partial`; an interrupted run
leaves it there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import driver, machine, table
from .cases import Case, domain_mixup, hypersphere_repulsion, margin_cross_entropy
from .peers import PEERS
from .process import RESULTS, check_output, command_line, partial, write_json
from .verify import require

FOLDER = RESULTS / "growth"
FORMAT = 1
# Rounds of a case, but of a slow one only as many as fit into so many seconds, and five at least.
ROUNDS, SECONDS = 51, 3.0
CONFIDENCE = 0.95
PICTURE = "growth-{}.png"


@dataclass(frozen=True)
class Series:
    """Cases of one op that differ in one size.

    Attributes:
        title: the op and the size, as tables name them. label: the same within a panel.
        axis: the size's letter in the shape. unit: what the size counts, singular.
        cases: the cases, from small to large.
        power: the power of the size by which the arithmetic grows.
        promise: the least and the greatest exponent that are promised, or None.
        fit_from: the size from which on the exponent is fitted.
    """

    title: str
    label: str
    axis: str
    unit: str
    cases: Sequence[Case]
    power: int
    promise: tuple[float, float] | None
    fit_from: int

    @property
    def op(self) -> str:
        """The op of all cases."""
        return self.cases[0].op


def doubled(first: int, last: int) -> list[int]:
    """Return first, 2·first, 4·first, … up to last."""
    return [first << i for i in range(int(math.log2(last / first)) + 1)]


LINEAR, QUADRATIC = (0.9, 1.1), (0.0, 2.0)
SERIES = {
    "classes": Series(
        "margin softmax over classes, N=128 D=128", "D=128", "C", "class",
        [margin_cross_entropy("growth", 128, 128, c) for c in doubled(10_000, 640_000)],
        1, LINEAR, 10_000,
    ),
    "classes, D=512": Series(
        "margin softmax over classes, N=128 D=512", "D=512", "C", "class",
        [margin_cross_entropy("growth", 128, 512, c) for c in doubled(10_000, 640_000)],
        1, LINEAR, 10_000,
    ),
    "batch": Series(
        "margin softmax over the batch, C=50,000 D=512", "D=512", "N", "sample",
        [margin_cross_entropy("growth", n, 512, 50_000) for n in doubled(32, 2048)],
        1, None, 256,
    ),
    "points, row-max": Series(
        "repulsion by row maxima over points, D=128", "row maxima", "N", "point",
        [hypersphere_repulsion("growth", n, 128, "row-max") for n in doubled(2500, 40_000)],
        2, QUADRATIC, 2500,
    ),
    "points, log-sum-exp": Series(
        "repulsion by log-sum-exp over points, D=128", "log-sum-exp", "N", "point",
        [hypersphere_repulsion("growth", n, 128, "log-sum-exp") for n in doubled(2500, 40_000)],
        2, QUADRATIC, 2500,
    ),
    "images": Series(
        "mixup over images, 112×112, float32", "112×112, float32", "B", "image",
        [domain_mixup("growth", b, 112, "float32", "contiguous") for b in doubled(1, 4096)],
        1, LINEAR, 64,
    ),
}  # fmt: skip


# The panels of a picture: a title, and the series in it.
PANELS = {
    "Margin softmax over classes, N=128": ["classes", "classes, D=512"],
    "Margin softmax over the batch, C=50,000": ["batch"],
    "Repulsion over points, D=128": ["points, row-max", "points, log-sum-exp"],
    "Mixup over images": ["images"],
}


def floor_of(op: str) -> str:
    """Return the name of the op's floor: its first peer that is a bound."""
    return next(peer.name for peer in PEERS[op] if peer.name in table.BOUNDS)


def measure(series: Series, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Return each case of a series, of ours and the floor, as `driver.measure_time` does."""
    wanted = ("ours", floor_of(series.op))
    peers = [peer for peer in PEERS[series.op] if peer.name in wanted]
    measured = []
    for case in series.cases:
        print(f"measuring {series.op}, {case.name}", file=sys.stderr)
        device = torch.device("cpu")
        measured.append(
            driver.measure_time(
                case, device, peers=peers, rounds=rounds, enough_seconds=SECONDS, settle=True
            )
        )
    return measured


def cases_of(series: Series, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the measured cases of a series."""
    names = [case.name for case in series.cases]
    return [case for case in result["cases"] if case["op"] == series.op and case["name"] in names]


def fits(series: Series, measured: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return by peer the fit of its times; of fewer than three times there is none."""
    found: dict[str, dict[str, Any]] = {}
    for peer in ("ours", floor_of(series.op)):
        sizes, seconds = times(series.axis, measured, peer)
        chosen = [i for i, size in enumerate(sizes) if size >= series.fit_from]
        if len(chosen) < 3:
            found[peer] = {"not_measured": f"{len(chosen)} sizes were measured"}
            continue
        exponent, margin = power_law([sizes[i] for i in chosen], [seconds[i] for i in chosen])
        found[peer] = {
            "exponent": exponent,
            "interval": [exponent - margin, exponent + margin],
            "from": sizes[chosen[0]],
            "to": sizes[chosen[-1]],
            "steps": [
                math.log(seconds[i + 1] / seconds[i]) / math.log(b / a)
                for i, (a, b) in enumerate(pairwise(sizes))
            ],
            "bend": bend(sizes, seconds, series.power),
        }
    return found


def times(
    axis: str, measured: Sequence[dict[str, Any]], peer: str
) -> tuple[list[int], list[float]]:
    """Return the sizes at which a peer was measured, and its median seconds."""
    pairs = [
        (case["shape"][axis], row["seconds"])
        for case in measured
        for row in case["peers"]
        if row["peer"] == peer and "seconds" in row
    ]
    return [size for size, _ in pairs], [seconds for _, seconds in pairs]


def power_law(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Return the exponent by least squares on logarithms, and its 95 % interval's half width."""
    from scipy.special import stdtrit

    (slope, _), covariance = np.polyfit(np.log(sizes), np.log(seconds), 1, cov=True)
    quantile = stdtrit(len(sizes) - 2, (1 + CONFIDENCE) / 2)  # of Student's t
    return float(slope), float(quantile * math.sqrt(covariance[0, 0]))


def bend(sizes: Sequence[float], seconds: Sequence[float], power: int) -> float | None:
    """Return the size at which a fixed time equals the time that grows by the power.

    The two are fitted by least squares of relative errors; None where no fixed time is found.
    """
    x, t = np.asarray(sizes, float), np.asarray(seconds)
    terms = np.stack([1 / t, x**power / t], 1)
    (fixed, growing), *_ = np.linalg.lstsq(terms, np.ones(len(t)), rcond=None)
    return float((fixed / growing) ** (1 / power)) if fixed > 0 and growing > 0 else None


def one_series(series: Series, measured: Sequence[dict[str, Any]]) -> str:
    """Return a table of a series: each size, the time of ours, of one unit, and of the floor."""
    floor = floor_of(series.op)
    rows = [[series.axis, "ours", f"per {series.unit}", floor, f"ours ÷ {floor}"]]
    for case in measured:
        found = {row["peer"]: row for row in case["peers"]}
        ours, other = (found.get(name, {}) for name in ("ours", floor))
        size, missing = case["shape"][series.axis], "not measured"
        if "seconds" in ours:
            each = table.duration(ours["seconds"] / size)
            cells = [table.duration(ours["seconds"]), each]
        else:
            cells = [missing, missing]
        cells.append(table.duration(other["seconds"]) if "seconds" in other else missing)
        cells.append(f"{1 / other['ratio']:.2f}" if "ratio" in other else missing)
        rows.append([f"{size:,}", *cells])
    return f"{series.title}\n\n{table.markdown(rows)}"


def exponents(result: dict[str, Any]) -> str:
    """Return a table of all fits of a result: exponents, promises, and where they bend."""
    head = ["time of", "fitted over", "exponent of ours", "promised", "of the floor", "bends at"]
    rows = [[*head, "measured"]]
    for name, series in SERIES.items():
        about, measured = result["series"].get(name), cases_of(series, result)
        if about is None:
            rows.append([series.title, "not measured", *[""] * (len(head) - 1)])
            continue
        run = f"{about['date']}, {about['commit']}; {busy(measured)}"
        ours, floor = (about["fits"][peer] for peer in ("ours", floor_of(series.op)))
        if "not_measured" in ours:
            why = f"not measured: {ours['not_measured']}"
            rows.append([series.title, why, *[""] * (len(head) - 2), run])
            continue
        span = f"{series.axis} = {ours['from']:,} … {ours['to']:,}"
        where = bends_at(series.axis, ours["bend"], times(series.axis, measured, "ours")[0])
        cells = [shown(ours), verdict(series, ours), shown(floor), where, run]
        rows.append([series.title, span, *cells])
    return table.markdown(rows)


def bends_at(axis: str, bend: float | None, sizes: Sequence[int]) -> str:
    """Return where a series bends; outside of the measured sizes, only on which side."""
    if bend is None or not sizes:
        return ""
    if bend < min(sizes):
        return f"below {axis} = {min(sizes):,}"
    if bend > max(sizes):
        return f"above {axis} = {max(sizes):,}"
    return f"{axis} ≈ {table.rounded(bend, 2)}"


def busy(measured: Sequence[dict[str, Any]]) -> str:
    """Return whether other programs ran while these cases were measured."""
    cores = [case["busy_cores"] for case in measured if not case.get("idle", True)]
    if not cores:
        return "nothing else running"
    return (
        f"other programs kept up to {max(cores):.1f} cores busy in {len(cores)} of "
        f"{len(measured)} cases"
    )


def shown(fit: dict[str, Any]) -> str:
    """Return an exponent with its interval's half width."""
    if "not_measured" in fit:
        return "not measured"
    return f"{fit['exponent']:.2f} ± {(fit['interval'][1] - fit['interval'][0]) / 2:.2f}"


def verdict(series: Series, fit: dict[str, Any]) -> str:
    """Return what is promised of an exponent, whether it is kept, and with what certainty."""
    if series.promise is None:
        return "–"
    least, most = series.promise
    words = f"{(least + most) / 2:.1f} ± {(most - least) / 2:.1f}" if least else f"≤ {most:.1f}"
    low, high = fit["interval"]
    if not least <= fit["exponent"] <= most:
        return f"{words}: missed"
    certain = least <= low and high <= most
    return f"{words}: kept" if certain else f"{words}: kept, but the interval reaches outside"


def results() -> dict[str, dict[str, Any]]:
    """Return all committed results of growth, by the names of their files without suffix."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


def section() -> str:
    """Return the text on growth of the page of all results."""
    parts = [
        "A size is doubled from case to case. The exponent is the slope of a line through the "
        "logarithms of size and median time, by least squares, with its 95 % interval, which is "
        "of the scatter of the times around that line and of nothing else. The bend is the size "
        "at which a fixed time equals the time that grows with the arithmetic, which is linear "
        "but for repulsion, where it is quadratic. `python -m benchmarks.growth` measures."
    ]
    for name, result in results().items():
        parts += [
            f"**{table.name_of(result['machine'])}**; torch {result['machine']['torch']}.",
            exponents(result),
            f"![time over size]({PICTURE.format(name)})",
        ]
    return "\n\n".join(parts)


def beginning(kept: Path | None, described: dict[str, Any]) -> dict[str, Any]:
    """Return a result without series, or that of a file of the same machine, if there is one.

    Raises:
        ValueError: if the file is of a machine of another description.
    """
    if kept is None or not kept.exists():
        return {"format": FORMAT, "machine": described, "cases": [], "series": {}}
    before: dict[str, Any] = json.loads(kept.read_text())
    for key in {**before["machine"], **described}:
        old, new = before["machine"].get(key), described.get(key)
        if old != new:
            raise ValueError(
                f"--series keeps the other series of {kept.name}, but their {key} is {old!r} and "
                f"this machine's {new!r}: measure all series, or give another --output"
            )
    return before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--series", action="append", choices=SERIES, help="Only this series.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="Rounds, fewer of long steps.")
    parser.add_argument(
        "--no-tests", action="store_true", help="Do not run the ops' tests before they are timed."
    )
    parser.add_argument("--output", type=Path, help="Result file, instead of the machine's.")
    args = parser.parse_args()
    chosen = args.series or list(SERIES)
    described = machine.describe(torch.device("cpu"))
    output = args.output or FOLDER / f"{machine.file_stem(described)}.json"
    try:
        check_output(output)
        result = beginning(output if args.series else None, described)
    except ValueError as error:
        parser.error(str(error))
    commit = machine.commit()
    if not args.no_tests:
        for op in dict.fromkeys(SERIES[name].op for name in chosen):
            require(op)
    for name in chosen:
        series = SERIES[name]
        measured = measure(series, args.rounds)
        print(f"\n{one_series(series, measured)}", flush=True)
        replaced = cases_of(series, result)
        result["cases"] = [case for case in result["cases"] if case not in replaced] + measured
        result["series"][name] = {
            "date": time.strftime("%Y-%m-%d"),
            "commit": commit,
            "command": command_line("benchmarks.growth"),
            "fits": fits(series, measured),
        }
        write_json(partial(output), result)
    partial(output).replace(output)
    print(f"\n{exponents(result)}\n\nwritten: {output.name}")


if __name__ == "__main__":
    main()
