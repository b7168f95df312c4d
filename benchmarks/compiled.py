"""The compiler's reports on the Triton kernels, which `tests/triton/aot.py` writes.

compiled.json holds, for each Triton, one row per kernel, dtypes, blocks and architecture, with the
most that any variant takes: labels, filters and the like are other variants of the same row. A
digest of what the compiler was given says whether a row is still of the present kernel, without
the minutes that compiling all of them takes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from .devices import REGISTERS, SHARED, SHARED_RESERVED, WARPS
from .launches import Launch, Region

PATH = Path(__file__).parent / "compiled.json"
# What a row's key has of a launch's constants, beside its blocks.
CONSTANTS = ("H", "ROOM", "FUSED", "PRECISION")
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
# The instruction of tensor cores for at least 64 rows, and the shared memory of one program.
INSTRUCTIONS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
SHARED_PER_PROGRAM = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

KEY = ("kernel", "dtypes", "blocks", "capability")

Row = dict[str, Any]


def key(launch: Launch) -> tuple[str, str, str]:
    """Return kernel, dtypes and blocks, by which rows are found."""
    names = {
        DTYPES[str(value.dtype).removeprefix("torch.")]
        for value in launch.arguments.values()
        if isinstance(value, Region) and value.dtype.is_floating_point
    }
    known = launch.arguments
    blocks = "×".join(str(v) for k, v in known.items() if k.startswith("BLOCK"))
    words = [blocks] if blocks else []
    words += [f"{name} {known[name]}" for name in CONSTANTS if name in known]
    words += [f"{v} {k[4:]}" for k, v in sorted(launch.options.items()) if k.startswith("num_")]
    return launch.name, ", ".join(sorted(names)), ", ".join(words)


def rows(reports: Iterable[Row]) -> list[Row]:
    """Return one row for each key and architecture, with the most of its variants."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for report in reports:
        group = tuple(report[name] for name in KEY)
        found.setdefault(group, []).append(report)
    table = []
    for group, variants in sorted(found.items()):
        row = dict(zip(KEY, group, strict=True))
        for name in ("instructions", "dots"):
            row[name] = sorted({value for variant in variants for value in variant[name]})
        for name in ("warps", "registers", "shared", "stack", "local"):
            row[name] = max(variant[name] for variant in variants)
        for name in ("f32", "f64"):
            row[f"fused_{name}"] = max(variant["fused"][name] for variant in variants)
        row["digest"] = digest(variant["digest"] for variant in variants)
        table.append(row)
    return table


def digest(variants: Iterable[str]) -> str:
    """Return a row's digest, of those of its variants."""
    return hashlib.sha256(" ".join(sorted(variants)).encode()).hexdigest()[:16]


@cache
def load() -> dict[str, list[Row]]:
    """Return the rows of each Triton, the oldest first."""
    return json.loads(PATH.read_text()) if PATH.exists() else {}


def newest() -> str:
    """Return the newest Triton that there are rows of."""
    return [*load()][-1]


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def save(triton: str, ops: list[str], table: list[Row]) -> None:
    """Replace the rows of some ops and one Triton, or add them."""
    load.cache_clear()
    tables = dict(load())
    others = [row for row in tables.get(triton, []) if row["kernel"].split(".")[0] not in ops]
    tables[triton] = sorted(others + table, key=lambda row: [row[name] for name in KEY])
    lines = [
        f' "{name}": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in tables[name]) + "\n ]"
        for name in sorted(tables, key=_numbers)
    ]
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    load.cache_clear()


@cache
def _found(capability: int) -> dict[tuple[str, str, str], Row]:
    tables = load()
    return {
        (row["kernel"], row["dtypes"], row["blocks"]): row
        for row in (tables[newest()] if tables else [])
        if row["capability"] == capability
    }


def find(launch: Launch, capability: int) -> Row:
    """Return a launch's row, of the newest Triton.

    Raises:
        LookupError: if there is none.
    """
    row = _found(capability).get(key(launch))
    if row is None:
        raise LookupError(
            f"no compiler's report on {' '.join(key(launch))} for sm_{capability} in {PATH.name}: "
            "run python tests/triton/aot.py --write"
        )
    return row


def programs_together(launch: Launch, capability: int) -> int:
    """Return how many programs of a launch a multiprocessor holds at a time."""
    row = find(launch, capability)
    per_warp = -(-row["registers"] * 32 // 256) * 256
    by_shared = SHARED // (row["shared"] + SHARED_RESERVED)
    return max(1, min(REGISTERS // (per_warp * row["warps"]), WARPS // row["warps"], by_shared, 32))
