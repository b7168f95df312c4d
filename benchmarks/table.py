"""Tables of result files; `python -m benchmarks.table` writes them to README.md.

With `--check` nothing is written: the exit status says whether README.md shows the committed
results.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from .cases import STEPS
from .process import RESULTS, ROOT

README = ROOT / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """Return a duration with its unit."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


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
        memory = "not measured" if peak is None else _size(peak)
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
    return f"{time}, {_size(row['peak_bytes'])}" if row.get("peak_bytes") is not None else time


def _one_op(op: str, cases: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(row["peer"] for case in cases for row in case["peers"]))
    rows = [["time ÷ ours, memory", *(case["name"] for case in cases)]]
    rows += [[name, *(_cell(case, name) for case in cases)] for name in names]
    return f"`{op}`, {STEPS[op]}:\n\n{markdown(rows)}"


def one_machine(result: dict[str, Any]) -> str:
    """Return tables of ratios and memory of every op and case of a result file."""
    about = result["machine"]
    where = f"{about['processor']}, {about['cores']} cores, {about['instruction_set']}"
    if "device" in about:
        where = f"{about['device']}, CUDA {about['cuda']}"
    states = dict.fromkeys(_state(case) for case in result["cases"])
    text = (
        f"**{where}**; torch {about['torch']}, {result['date']}, `{result['command']}`; "
        f"{'; '.join(states)}."
    )
    ceilings = result.get("ceilings", {})
    if "product_tflop_per_second" in ceilings:
        text += (
            f" Measured there: a copy at {ceilings['copy_gigabyte_per_second']:.0f} GB/s, "
            f"a product ({ceilings['product']}) at "
            f"{ceilings['product_tflop_per_second']:.0f} TFLOP/s"
        )
        for kind in ("float32", "tf32"):
            if f"{kind}_tflop_per_second" in ceilings:
                text += f", in {kind} at {ceilings[f'{kind}_tflop_per_second']:.0f}"
        text += "."
    for op in dict.fromkeys(case["op"] for case in result["cases"]):
        text += "\n\n" + _one_op(op, [case for case in result["cases"] if case["op"] == op])
    return text


def render() -> str:
    """Return README.md's text between the marks: every committed result, CPUs first.

    Results of runs that ended before they described their machine are left out.
    """
    paths = sorted(path for path in RESULTS.glob("*.json") if path.stem != "dry-run")
    results = [json.loads(path.read_text()) for path in paths]
    results = [result for result in results if "not_measured" not in result["machine"]]
    cpus = [result for result in results if "device" not in result["machine"]]
    gpus = [result for result in results if "device" in result["machine"]]
    parts = [one_machine(result) for result in cpus + gpus]
    if not cpus:
        parts.insert(0, "On a CPU: not measured.")
    if not gpus:
        parts.append("On a GPU: not measured.")
    return "\n\n".join(parts)


def main() -> None:
    text = README.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    wanted = f"{before}{BEGIN}\n{render()}\n{END}{after}"
    if "--check" not in sys.argv[1:]:
        README.write_text(wanted)
    elif text != wanted:
        sys.exit("README.md does not show the committed results: run python -m benchmarks.table")


if __name__ == "__main__":
    main()
