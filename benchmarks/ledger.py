"""A ledger of the GPU kernels: FLOP, bytes by level, launches, and the time that follows.

`python -m benchmarks.ledger` prints it, of one op with `--op`, for one device with `--device`.
`--write` writes docs/gpu.md from it, from the compiler's reports and from committed measurements;
`--check` says by the exit status whether that page is current. Nothing runs on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import Any

from . import compiled, devices
from .cases import CASES, STEPS, Case, cases
from .devices import DEVICES, Device
from .predict import Account, Entry, account, recorded
from .process import RESULTS, ROOT
from .table import duration, markdown

PAGE = ROOT / "docs" / "gpu.md"
# Kernels that take less than this share of a step are one line together.
SMALL_SHARE = 0.01
UNITS = (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")


def quantity(number: float, unit: str) -> str:
    """Return a number with three digits, a prefix and its unit."""
    for scale, prefix in UNITS:
        if number >= scale:
            return f"{number / scale:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}"


def gpus(names: Iterable[str]) -> list[Device]:
    """Return devices by their names, with ceilings measured on such GPUs where there are any."""
    measured = devices.results(RESULTS)
    return [devices.with_ceilings(devices.device(name), measured.get(name)) for name in names]


def measured_seconds(case: Case, gpu: Device) -> float | None:
    """Return the time of a case in the committed results of such a GPU, or None."""
    for row in devices.results(RESULTS).get(gpu.name, {}).get("cases", []):
        if (row["op"], row["name"]) == (case.op, case.name):
            ours = [peer for peer in row["peers"] if peer["peer"] == "ours"]
            return ours[0].get("seconds") if ours else None
    return None


def _measured(case: Case, gpu: Device) -> str:
    seconds = measured_seconds(case, gpu)
    return "not measured" if seconds is None else duration(seconds)


# ---- tables --------------------------------------------------------------------------------------


def one_op(op: str, gpus: list[Device]) -> str:
    """Return a table of an op's cases: what a step costs, and predicted and measured times."""
    head = ["case", "FLOP", "memory", "L2", "launches"]
    if op == "margin_cross_entropy":
        head.append("workspace per logit")
    for gpu in gpus:
        head += [f"{gpu.name}: kernels", "host", "floor", "predicted", "measured"]
    rows = [head]
    for case in cases("gpu", op):
        accounts = [account(case, gpu) for gpu in gpus]
        first = accounts[0]
        row = [
            case.name,
            quantity(sum(entry.flops for entry in first.entries), ""),
            quantity(sum(entry.memory for entry in first.entries), "B"),
            quantity(sum(entry.l2 for entry in first.entries), "B"),
            f"{sum(entry.kernels for entry in first.entries):,}",
        ]
        if op == "margin_cross_entropy":
            row.append(f"{first.bytes_per_logit:.1f} B")
        for found, gpu in zip(accounts, gpus, strict=True):
            row += [
                duration(found.device_seconds),
                duration(found.host_seconds),
                duration(found.floor_seconds),
                f"{duration(found.seconds)} ({found.floor_seconds / found.seconds:.0%})",
                _measured(case, gpu),
            ]
        rows.append(row)
    return markdown(rows)


def _resources(case: Case, name: str, gpu: Device) -> list[str]:
    """Return instruction, registers, shared memory and spills of a kernel's launches in a case."""
    if name.startswith("torch."):
        return ["", "", "", ""]
    launches = recorded(case, gpu.capability, gpu.multiprocessors).launches
    rows = [compiled.find(launch, gpu.capability) for launch in launches if launch.name == name]
    words = sorted({word for row in rows for word in row["instructions"]})
    return [
        ", ".join(words) or "–",
        str(max(row["registers"] for row in rows)),
        f"{max(row['shared'] for row in rows) / 1024:.3g} KiB",
        str(max(row["stack"] + row["local"] for row in rows)),
    ]


def _line(name: str, entries: list[Entry], resources: list[str]) -> list[str]:
    bounds = [entry.bound for entry in entries]
    return [
        name,
        f"{sum(entry.kernels for entry in entries):,}",
        quantity(sum(entry.flops for entry in entries), ""),
        quantity(sum(entry.memory for entry in entries), "B"),
        quantity(sum(entry.l2 for entry in entries), "B"),
        duration(sum(entry.seconds for entry in entries)),
        max(bounds, key=bounds.count),
        *resources,
    ]


def one_case(found: Account) -> str:
    """Return a table of a case's kernels: what each costs, and what the compiler made of it."""
    head = ["kernel", "launches", "FLOP", "memory", "L2", "time", "bound by", "instruction"]
    rows = [[*head, "registers", "shared", "spills"]]
    small: list[Entry] = []
    for name, entries in found.by_kernel().items():
        seconds = sum(entry.seconds for entry in entries)
        if seconds < SMALL_SHARE * found.device_seconds:
            small += entries
        else:
            short = name.removeprefix(f"{found.case.op}.").strip("_").removesuffix("_kernel")
            rows.append(_line(short, entries, _resources(found.case, name, found.device)))
    if small:
        rows.append(_line("others", small, [""] * 4))
    return markdown(rows)


def compiler_table(rows: list[dict[str, Any]]) -> str:
    """Return a table of one Triton's rows: a line per kernel, dtypes and blocks."""
    lines: dict[tuple[str, str, str], dict[int, str]] = {}
    for row in rows:
        cell = f"{row['registers']}, {row['shared'] / 1024:.3g} KiB, {row['stack'] + row['local']}"
        cell += "".join(f", {word.split('.')[0]}" for word in row["instructions"])
        key = row["kernel"], row["dtypes"], row["blocks"]
        lines.setdefault(key, {})[row["capability"]] = cell
    table = [["kernel", "dtypes", "blocks", *(f"sm_{name}" for name in compiled.INSTRUCTIONS)]]
    for (kernel, dtypes, blocks), cells in sorted(lines.items()):
        op, name = kernel.split(".")
        name = f"{op}: {name.strip('_').removesuffix('_kernel')}"
        table.append(
            [name, dtypes, blocks, *(cells.get(each, "") for each in compiled.INSTRUCTIONS)]
        )
    return markdown(table)


# ---- the page ------------------------------------------------------------------------------------


INTRODUCTION = """\
The ledger runs each op's step on tensors without data, records what it launches, and counts FLOP,
bytes and operations of every kernel (`benchmarks/costs.py`). The time follows from the rates below.
*Memory* is what comes from or goes to device memory, *L2* all that goes through the L2 cache,
*floor* the time of the least FLOP or bytes that the case needs (three GEMMs for the margin
softmax), and the percentage the floor's share of the predicted time."""


def _ceilings(gpus: list[Device]) -> str:
    rows = [["", "multiprocessors", "L2", "memory", "a copy", "16-bit GEMMs", "copy and GEMM are"]]
    for gpu in gpus:
        rows.append(
            [
                gpu.name,
                str(gpu.multiprocessors),
                f"{gpu.l2_bytes >> 20} MiB",
                quantity(gpu.memory_rate, "B/s"),
                quantity(gpu.copy_rate, "B/s"),
                quantity(gpu.tensor_rate, "FLOP/s"),
                "measured" if gpu.measured else "assumed",
            ]
        )
    return markdown(rows)


def _assumptions() -> str:
    host = ", ".join(
        f"{duration(seconds)} per {what}"
        for what, seconds in zip(
            ("Triton kernel", "GEMM", "other operator"), devices.HOST_SECONDS.values(), strict=True
        )
    )
    return f"""\
- A large 16-bit GEMM sustains {devices.SUSTAINED_TENSOR:.0%} of the data sheet's rate, for power
  limits the clock; a copy {devices.SUSTAINED_COPY:.0%} of the memory's rate.
- The L2 gives {devices.L2_BYTES:,} bytes per clock (the A100's white paper; the H100's rate is not
  published), and holds {devices.L2_SHARE:.0%} of its size, for multiprocessors of both its halves
  read most data. It is simulated: pages, the least recently used of which are written back.
- A tile's GEMM takes the tensor cores' time or that of the shared memory, whichever is longer
  ({devices.SHARED_BYTES} bytes per clock; each 64 rows read the columns anew). Loads' latency, GEMM
  and epilogue follow one another in a program; programs that fit a multiprocessor together (by
  registers and shared memory, as compiled) overlap.
- The latency is {devices.FILL_CLOCKS:,} clocks. The epilogue is counted in operations per element,
  of which a multiprocessor does {devices.FLOAT32_LANES} per clock ({devices.SPECIAL_LANES}
  exponentials, {devices.FLOAT64_LANES} in float64).
- The busiest multiprocessor has ⌈programs / multiprocessors⌉ of a grid's programs.
- cuBLAS takes the fastest of six blocks and six splits of the sum, in clusters of two.
- {duration(devices.LAUNCH_GAP)} between kernels; the host needs {host}, which a captured graph
  takes once. A step takes the longer of the two."""


def page(gpus: list[Device]) -> str:
    """Return docs/gpu.md."""
    found = devices.results(RESULTS)
    state = "Measured on a GPU: nothing yet. Every time on this page is predicted."
    if found:
        state = "Measured: " + "; ".join(
            f"{name} ({result['date']}, torch {result['machine']['torch']})"
            for name, result in found.items()
        )
    parts = [
        "# The GPU kernels: counted, compiled, measured",
        "Written by `python -m benchmarks.ledger --write`; `--check` says whether it is current.",
        state,
        INTRODUCTION,
        "## Rates and assumptions",
        _ceilings(gpus),
        "Data sheets: NVIDIA H100 (SXM5) and H200 (SXM). Until they are measured, these hold:",
        _assumptions(),
        "## Predictions",
    ]
    for op in CASES:
        parts += [f"`{op}`, {STEPS[op]}:", one_op(op, gpus)]
    parts.append(f"## Kernels, on an {gpus[0].name}")
    parts.append(
        "Registers, shared memory and spilled bytes are for sm_"
        f"{gpus[0].capability}, by Triton {compiled.newest()}."
    )
    for op in CASES:
        for case in cases("gpu", op):
            parts += [f"`{op}`, {case.name}:", one_case(account(case, gpus[0]))]
    parts.append("## The compiler's report")
    parts.append(
        "Registers, shared memory, spilled bytes per thread and tensor cores' instruction of each"
        " kernel, the most of its variants. `python tests/triton/aot.py --write` compiles them,"
        " without a GPU, in minutes; `tests/triton/test_aot.py` holds the limits, and knows by a"
        " digest of what the compiler is given that each row is of the present kernel."
    )
    for triton, rows in compiled.load().items():
        parts += [f"Triton {triton}:", compiler_table(rows)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--op", choices=list(CASES), help="Print one op alone.")
    parser.add_argument("--device", default="H100", help=f"GPU: {', '.join(DEVICES)}.")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="Write docs/gpu.md.")
    action.add_argument("--check", action="store_true", help="Check that docs/gpu.md is current.")
    args = parser.parse_args()
    if args.write:
        PAGE.write_text(page(gpus(DEVICES)))
        return
    if args.check:
        if not PAGE.exists() or PAGE.read_text() != page(gpus(DEVICES)):
            sys.exit("docs/gpu.md is not current: run python -m benchmarks.ledger --write")
        return
    try:
        chosen = gpus([args.device])
    except ValueError as error:
        sys.exit(str(error))
    for op in [args.op] if args.op else CASES:
        print(f"\n{op}, {STEPS[op]}\n\n{one_op(op, chosen)}")
        for case in cases("gpu", op):
            print(f"\n{case.name}\n\n{one_case(account(case, chosen[0]))}")


if __name__ == "__main__":
    main()
