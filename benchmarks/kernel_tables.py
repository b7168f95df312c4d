"""Tables of what `make gpu-evidence` measures beside the cases: kernels, settings and replays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .table import committed, duration, markdown, name_of, size

# The kernels of a profile that are shown.
TOP = 10
Row = dict[str, Any]


def section() -> str:
    """Return the text on kernels of the page of all results; "" where no result has any."""
    parts = []
    for result in committed().values():
        tables = one_machine(result)
        if tables:
            parts += [f"**{name_of(result['machine'])}**", tables]
    return "\n\n".join(parts)


def one_machine(result: Row) -> str:
    """Return tables of a result's profiles, sweeps, blocks and replays."""
    tables: dict[str, Callable[[Row], str]] = {
        "profiles": _profile, "sweeps": _sweep, "blocks": _blocks,
    }  # fmt: skip
    parts = [one(row) for kind, one in tables.items() for row in result.get(kind, [])]
    if result.get("replays"):
        parts.append(_replays(result["replays"]))
    return "\n\n".join(parts)


def _profile(row: Row) -> str:
    if "kernels" not in row:
        return f"{_case(row)}, its kernels: {_why(row)}."
    rows = [["kernel", "launches", "time", "of all kernels"]]
    for kernel in row["kernels"][:TOP]:
        share = f"{kernel['seconds'] / row['kernel_seconds']:.0%}"
        launches = f"{kernel['launches']:g}"
        rows.append([f"`{kernel['kernel']}`", launches, duration(kernel["seconds"]), share])
    return (
        f"{_case(row)}: a step takes {duration(row['step_seconds'])}, the kernels of its "
        f"{row['launches']:g} launches {duration(row['kernel_seconds'])}; the longest:\n\n"
        f"{markdown(rows)}"
    )


def _sweep(row: Row) -> str:
    rows = [["design", "workspace", "time", "peak extra memory"]]
    for setting in row.get("settings", []):
        peak = setting.get("peak_bytes")
        rows.append([
            setting["design"], f"{setting['workspace_mib']} MiB",
            _time(setting, setting == row.get("fastest")), "" if peak is None else size(peak),
        ])  # fmt: skip
    return f"{_case(row)}, a step by design and workspace:\n\n{_or_why(rows, row)}"


def _blocks(row: Row) -> str:
    rows = [["kernel", "blocks", "time of its pass", "÷ default's"]]
    for setting in row.get("settings", []):
        kernel, blocks = setting["kernel"], setting["blocks"]
        shown = ", ".join(f"{name} {value}" for name, value in blocks.items())
        time = _time(setting, blocks == row["fastest"].get(kernel))
        rows.append([kernel, shown, time, f"{setting['ratio']:.3f}" if "ratio" in setting else ""])
    text = f"{_case(row)}, a pass by a kernel's blocks, the default first:\n\n{_or_why(rows, row)}"
    together = row.get("together")
    if together is None:
        return text
    return (
        f"{text}\n\nBoth passes take {duration(together['default_seconds'])} by the default, "
        f"{_time(together)} by the fastest blocks of all three kernels."
    )


def _replays(replays: list[Row]) -> str:
    rows = [["case", "eager step", "replayed", "same bits"]]
    for row in replays:
        if "replay_seconds" in row:
            bits = "yes" if row["same_bits_as_eager"] else "no"
            times = [duration(row[f"{kind}_seconds"]) for kind in ("eager", "replay")]
            rows.append([_case(row), *times, bits])
        else:
            rows.append([_case(row), _why(row), "", ""])
    return f"Steps captured in a CUDA graph:\n\n{markdown(rows)}"


def _case(row: Row) -> str:
    return f"`{row['op']}`, {row['name']}"


def _time(row: Row, fastest: bool = False) -> str:
    if "seconds" not in row:
        return _why(row)
    return f"**{duration(row['seconds'])}**" if fastest else duration(row["seconds"])


def _why(row: Row) -> str:
    return f"not measured: {row.get('not_measured') or row.get('problem')}"


def _or_why(rows: list[list[str]], row: Row) -> str:
    """Return a table with why it ends early, if it does."""
    ended = row.get("not_measured") or row.get("problem")
    parts = [markdown(rows)] if len(rows) > 1 else []
    return "\n\n".join([*parts, f"Not measured: {ended}."] if ended else parts)
