"""Each op's attained FLOP rate by arithmetic intensity, under the ceilings of its machine.

FLOPs and bytes are the least that a case needs, so work done twice does not count twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from . import table
from .cases import HEADLINES, cases

PICTURE = "roofline-{}.png"
# Bytes of a label; class sampling, which has no FLOPs, is drawn at one operation for each.
LABEL_BYTES = 8
# What ops are called in the table and the picture.
LABELS = {
    "margin_cross_entropy": "margin softmax",
    "hypersphere_repulsion": "repulsion, {}",
    "domain_mixup": "mixup",
    "row_update": "row update, {}",
    "sample_classes": "class sampling",
}
# Where a GEMM's throughput by dtype is in the ceilings.
GEMM_CEILINGS = {
    "bfloat16": "product_tflop_per_second",
    "float16": "product_tflop_per_second",
    "float32": "float32_tflop_per_second",
}
ROOFS = ("float32", "bfloat16")  # that are drawn


@dataclass(frozen=True)
class Point:
    """One op and case on the roofline.

    Attributes:
        label: the op, and the energy where it has one. case: the case's name.
        intensity: FLOP per byte. rate: attained FLOP per second.
        roof: the most that the machine's copy and GEMM allow at this intensity.
        counted: whether the op has FLOPs, or operations were counted in their place.
    """

    label: str
    case: str
    intensity: float
    rate: float
    roof: float
    counted: bool = True


def ceilings(result: dict[str, Any]) -> tuple[float, dict[str, float]] | None:
    """Return bytes per second of a copy and FLOP per second of GEMMs by dtype, if measured."""
    found = result.get("ceilings", {})
    if not {"copy_gigabyte_per_second", *GEMM_CEILINGS.values()} <= found.keys():
        return None
    rates = {dtype: 1e12 * found[key] for dtype, key in GEMM_CEILINGS.items()}
    return 1e9 * found["copy_gigabyte_per_second"], rates


def points(result: dict[str, Any]) -> list[Point]:
    """Return the headlines of a result that were measured, and the neighbors of repulsion's."""
    limits = ceilings(result)
    if limits is None:
        return []
    copy, gemms = limits
    suite = table.suite_of(result)
    shown = {(op, c.name) for op, n in HEADLINES.items() for c in cases(suite, op)[:n]}
    found = []
    for case in result["cases"]:
        if (case["op"], case["name"]) not in shown or not case["peers"]:
            continue
        label = LABELS[case["op"]].format(*case["options"])
        costs = {"ours": (label, case["flops"], case["bytes"])}
        if "row-max" in case["options"]:  # the search alone writes no gradient
            costs["ours, neighbors"] = ("neighbors", case["flops"], case["bytes"] // 2)
        for row in case["peers"]:
            if row["peer"] not in costs or "seconds" not in row:
                continue
            label, flops, moved = costs[row["peer"]]
            operations = flops or moved / LABEL_BYTES
            intensity = operations / moved
            roof = min(copy * intensity, gemms.get(case.get("gemm_dtype", case["dtype"]), math.inf))
            rate = operations / row["seconds"]
            found.append(Point(label, case["name"], intensity, rate, roof, bool(flops)))
    return found


def one_machine(result: dict[str, Any]) -> str:
    """Return a table of all points of a result."""
    rows = [["op", "case", "FLOP/byte", "GFLOP/s", "of the roof"]]
    for point in points(result):
        numbers = [table.rounded(x, 3) for x in (point.intensity, point.rate / 1e9)]
        share = f"{point.rate / point.roof:.0%}"
        cells = numbers if point.counted else ["–", "–"]
        rows.append([point.label, point.case, *cells, share])
    return table.markdown(rows)


def section() -> str:
    """Return the text on the roofline of the page of all results."""
    parts = [
        "The roof is the lower of two measured ceilings: a large copy's bytes per second times the "
        "FLOP per byte that a case needs, and a large GEMM in the case's dtype (`torch.mm`). Ops "
        "that take bfloat16 GEMMs for float32 points, or whose data stay in the cache, exceed it. "
        "Class sampling has no FLOPs: in the picture each label and id is one operation."
    ]
    for name, result in drawn().items():
        parts += [
            f"**{table.name_of(result['machine'])}**",
            one_machine(result),
            f"![roofline]({PICTURE.format(name)})",
        ]
    return "\n\n".join(parts if len(parts) > 1 else [*parts, "Not measured."])


def drawn() -> dict[str, dict[str, Any]]:
    """Return the committed results that have ceilings and points, by the stems of their files."""
    return {name: result for name, result in table.committed().items() if points(result)}
