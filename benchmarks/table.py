"""Tables of the committed results: in README.md, one row for each op; on a page, all of them.

`python -m benchmarks.table` writes both, and draws the pictures. With `--check` nothing is written:
the exit status says whether both show the committed results.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from .cases import HEADLINES, STEPS, cases
from .process import RESULTS, ROOT

README = ROOT / "README.md"
PAGE = ROOT / "docs" / "results" / "benchmarks.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


# Peers that do only a part of an op's work; the first that an op has is its floor.
BOUNDS = (
    "three products", "half products", "copy_ that moves as many bytes",
    "copy_ that moves twice as many",
)  # fmt: skip
# Kinds of machines that are to be measured; one without a result is named as such.
KINDS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "an AMD processor": lambda machine: "device" not in machine and "AMD" in machine["processor"],
    "an Intel processor": lambda machine: (
        "device" not in machine and "Intel" in machine["processor"]
    ),
    "a GPU": lambda machine: "device" in machine,
}


def size(count: float) -> str:
    """Return a number of bytes with its unit."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """Return a duration with its unit."""
    for unit, scale in (("µs", 1e6), ("ms", 1e3)):
        value = float(f"{seconds * scale:.3g}")  # the rounded one decides about the unit
        if value < 1000:
            return f"{value:g} {unit}"
    return f"{seconds:.2f} s"


def rounded(number: float, digits: int) -> str:
    """Return a number rounded to some digits, without an exponent: "1,250", "0.667"."""
    return f"{Decimal(f'{number:.{digits}g}'):,f}"


def markdown(rows: list[list[str]]) -> str:
    """Return a Markdown table; the first row is its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _state(case: dict[str, Any]) -> str:
    if case.get("idle", True):
        return "nothing else running"
    return f"other programs kept {case['busy_cores']:.1f} cores busy"


def one_case(case: dict[str, Any]) -> str:
    """Return a table of all measurements of a case."""
    rows = [["peer", "time ÷ ours", "least…most", "time", "peak extra memory", "what"]]
    for row in case["peers"]:
        if "not_measured" in row:
            why = f"not measured: {row['not_measured']}"
            rows.append([row["peer"], why, "", "", "", row["label"]])
            continue
        ratio, spread = "not measured", ""
        if "ratio" in row:
            low, high = row["ratio_range"]
            ratio, spread = f"{row['ratio']:.2f}", f"{low:.2f}…{high:.2f}"
        peak = row.get("peak_bytes")
        memory = "not measured" if peak is None else size(peak)
        rows.append([row["peer"], ratio, spread, duration(row["seconds"]), memory, row["label"]])
    if not case["peers"]:
        reason = case.get("not_measured") or case.get("problem")
        rows.append([f"not measured: {reason}", "", "", "", "", ""])
    rounds = case.get("rounds", 0)
    head = f"{case['op']}, {case['name']}: {rounds} rounds, {_state(case)}"
    if "implementation" in case:
        head += f", ours is {case['implementation']}"
    return f"\n{head}\n{markdown(rows)}\n"


def _cell(case: dict[str, Any], peer: str) -> str:
    row = next((row for row in case["peers"] if row["peer"] == peer), None)
    if row is None or "ratio" not in row:
        return "not measured"
    time = f"{row['ratio']:.2f}×"
    if peer == "ours":
        gemm = "float32" if case.get("gemm_dtype") == "float32" else "bf16"
        ceilings = {"share_of_product": f"the {gemm} product", "share_of_copy": "the copy"}
        shares = [(row[key], what) for key, what in ceilings.items() if key in row]
        time = f"1 ({duration(row['seconds'])}"
        if shares:  # the ceiling that is nearer
            share, what = max(shares)
            time += f", {share:.0%} of {what}"
        time += ")"
    return f"{time}, {size(row['peak_bytes'])}" if row.get("peak_bytes") is not None else time


def _one_op(op: str, cases: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(row["peer"] for case in cases for row in case["peers"]))
    rows = [["time ÷ ours, memory", *(case["name"] for case in cases)]]
    rows += [[name, *(_cell(case, name) for case in cases)] for name in names]
    return f"`{op}`, {STEPS[op]}:\n\n{markdown(rows)}"


def name_of(machine: dict[str, Any]) -> str:
    """Return a machine's device, or its processor with cores and instruction set."""
    if "device" in machine:
        return f"{machine['device']}, CUDA {machine['cuda']}"
    return f"{machine['processor']}, {machine['cores']} cores, {machine['instruction_set']}"


def about(result: dict[str, Any]) -> str:
    """Return a result's machine, versions, date, command, and whether it was idle."""
    machine = result["machine"]
    states = dict.fromkeys(_state(case) for case in result["cases"])
    return (
        f"**{name_of(machine)}**; torch {machine['torch']}, {result['date']}, "
        f"`{result['command']}`; {'; '.join(states)}."
    )


def one_machine(result: dict[str, Any]) -> str:
    """Return tables of ratios and memory of every op and case of a result file."""
    text = about(result)
    ceilings = result.get("ceilings", {})
    if "product_tflop_per_second" in ceilings:
        product = ceilings["product_tflop_per_second"]
        unit, scale = ("TFLOP/s", 1) if product >= 1 else ("GFLOP/s", 1000)
        text += (
            f" Measured there: a copy at {ceilings['copy_gigabyte_per_second']:.0f} GB/s, "
            f"a product ({ceilings['product']}) at {scale * product:.0f} {unit}"
        )
        for kind in ("float32", "tf32"):
            if f"{kind}_tflop_per_second" in ceilings:
                text += f", in {kind} at {scale * ceilings[f'{kind}_tflop_per_second']:.0f}"
        text += "."
    for op in dict.fromkeys(case["op"] for case in result["cases"]):
        text += "\n\n" + _one_op(op, [case for case in result["cases"] if case["op"] == op])
    return text


def committed() -> dict[str, dict[str, Any]]:
    """Return every committed result by its file's name without suffix, CPUs first.

    Results of runs that ended before they described their machine are left out.
    """
    paths = sorted(path for path in RESULTS.glob("*.json") if path.stem != "dry-run")
    results = {path.stem: json.loads(path.read_text()) for path in paths}
    known = [item for item in results.items() if "not_measured" not in item[1]["machine"]]
    return dict(sorted(known, key=lambda item: "device" in item[1]["machine"]))


def render() -> str:
    """Return the tables of every committed result, CPUs first."""
    results = [*committed().values()]
    parts = [one_machine(result) for result in results]
    if not any("device" not in result["machine"] for result in results):
        parts.insert(0, "On a CPU: not measured.")
    if not any("device" in result["machine"] for result in results):
        parts.append("On a GPU: not measured.")
    return "\n\n".join(parts)


# ---- README --------------------------------------------------------------------------------------

COLUMNS = ("eager torch", "eager torch, lean", "torch.compile")


def suite_of(result: dict[str, Any]) -> str:
    """Return the suite that a result is of: "gpu" or "cpu"."""
    return "gpu" if "device" in result["machine"] else "cpu"


def headline() -> str:
    """Return README.md's text between the marks: a table of each machine, a row of each op."""
    parts = []
    for result in committed().values():
        suite = suite_of(result)
        rows = [["", "ours", "floor", *COLUMNS, "fastest other"]]
        rows += [_row(op, cases(suite, op)[0].name, result) for op in HEADLINES]
        parts += [markdown(rows), about(result)]
    return "\n\n".join([*parts, *_missing()])


def _row(op: str, name: str, result: dict[str, Any]) -> list[str]:
    """Return an op's row: our time and memory, and the others' times as multiples of ours."""
    head = f"`{op}`, {name}"
    case = find(result, op, name)
    if case is None:
        return [head, "not measured", "", *("" for _ in COLUMNS), ""]
    peers = [row["peer"] for row in case["peers"]]
    named = [
        [f"{peer}: {_cell(case, peer)}" for peer in found] or ["–"]
        for found in (_floor(peers), _fastest([case]))
    ]
    columns = [_cell(case, peer) if peer in peers else "–" for peer in COLUMNS]
    return [head, _bold(case), *named[0], *columns, *named[1]]


def find(result: dict[str, Any], op: str, name: str) -> dict[str, Any] | None:
    """Return a result's case by its op and name, or None."""
    return next((c for c in result["cases"] if (c["op"], c["name"]) == (op, name)), None)


def _missing() -> list[str]:
    """Return a sentence on the kinds of machines without a result, or nothing."""
    machines = [result["machine"] for result in committed().values()]
    missing = [kind for kind, is_it in KINDS.items() if not any(map(is_it, machines))]
    return [" ".join(f"On {kind}: not measured." for kind in missing)] if missing else []


# ---- the page of all results ---------------------------------------------------------------------


def summary() -> str:
    """Return the headlines with one column for each machine."""
    results = [*committed().values()]
    parts = []
    for suite in ("cpu", "gpu"):
        group = [result for result in results if suite_of(result) == suite]
        for op in HEADLINES if group else ():
            names = [case.name for case in cases(suite, op)[: HEADLINES[op]]]
            parts.append(side_by_side(op, names, group))
        parts += [about(result) for result in group]
    return "\n\n".join([*parts, *_missing()])


def side_by_side(op: str, names: Sequence[str], results: Sequence[dict[str, Any]]) -> str:
    """Return a table of an op's headlines, one column for each machine.

    The first case is shown with every peer that a machine measured, the others with the floor and
    the fastest implementation.
    """
    rows = [["", *(name_of(result["machine"]) for result in results)]]
    for number, name in enumerate(names):
        found = [find(result, op, name) for result in results]
        rows.append([f"**{name}**", *(_bold(case) for case in found)])
        peers = dict.fromkeys(
            row["peer"] for case in found if case for row in case["peers"] if "ratio" in row
        )
        others = [peer for peer in peers if peer != "ours"]
        if number:
            others = [*_floor(others), *_fastest([case for case in found if case])]
        for peer in others:
            rows.append([peer, *(_cell(case, peer) if case else "" for case in found)])
    return f"`{op}`, {STEPS[op]}:\n\n{markdown(rows)}"


def _floor(peers: list[str]) -> list[str]:
    """Return the op's floor, if it is among the peers."""
    return [peer for peer in peers if peer in BOUNDS][:1]


def _fastest(found: list[dict[str, Any]]) -> list[str]:
    """Return the implementation of the least ratio in any of the cases, as far as measured."""
    ratios = [(row["ratio"], row["peer"]) for c in found for row in c["peers"] if "ratio" in row]
    others = [pair for pair in sorted(ratios) if pair[1].partition(",")[0] not in ("ours", *BOUNDS)]
    return [peer for _, peer in others[:1]]


def _bold(case: dict[str, Any] | None) -> str:
    """Return our time of a case, which ratios are multiples of, and our memory."""
    rows = case["peers"] if case else []
    row = next((row for row in rows if row["peer"] == "ours"), None)
    if row is None or "seconds" not in row:
        return "not measured"
    time, peak = f"**{duration(row['seconds'])}**", row.get("peak_bytes")
    return time if peak is None else f"{time}, {size(peak)}"


def page() -> str:
    """Return the page of all results, with the pictures that `pictures` draws."""
    from . import gpu_training, growth, kernel_tables, roofline

    kernels = kernel_tables.section()
    parts = [
        "# Results of the benchmarks",
        "Written by `python -m benchmarks.table` from the files in `benchmarks/results`; "
        "[performance.md](../performance.md) says what is measured, and how.",
        "## Machines side by side",
        "A bold row has a case, our time and our peak memory above the inputs. The rows below it "
        "have the others' time as a multiple of ours, and their memory: every peer of an op's "
        "first case; of the further cases the floor and the fastest implementation.",
        summary(),
        "## Ops and their peers",
        render(),
        *(["## Kernels, settings and graphs on a GPU", kernels] if kernels else []),
        "## Growth",
        growth.section(),
        "## The training layer on a GPU",
        gpu_training.section(),
        "## Roofline",
        roofline.section(),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    text = README.read_text()
    before, rest = text.split(BEGIN)
    wanted = {
        README: f"{before}{BEGIN}\n{headline()}\n{END}{rest.split(END)[1]}",
        PAGE: page(),
    }
    if "--check" in sys.argv[1:]:
        for path, content in wanted.items():
            if not path.exists() or path.read_text() != content:
                sys.exit(
                    f"{path.name} does not show the committed results: run "
                    "python -m benchmarks.table"
                )
        return
    for path, content in wanted.items():
        path.write_text(content)
    from . import pictures

    pictures.draw_all()


if __name__ == "__main__":
    main()
