"""Comparison of two result files of the benchmarks, by ratios to a peer of the same run.

It needs neither torch nor the machine that the files are from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.textfiles import read_json

FORMAT = 1  # of the files; those without one have it too
MAX_BYTES = 2**24
BY = ("ratio", "time")
OURS = "ours"  # begins the names of our own rows
# The floor of each op, which times are held against by default.
FLOORS = ("three products", "half products", "copy_ that moves as many bytes")
# Keys of a machine: files that differ in the first ones are refused, in the others only warned of.
KIND = ("processor", "cores", "device", "system")
NOTED = (
    "threads", "instruction_set", "synface_kernels", "commit", "torch", "triton", "numpy", "python",
    "cuda",
)  # fmt: skip
# Bytes by which the peak memory of equal steps differs: the kernel counts pages in batches.
MEMORY_NOISE = 2 << 20
ABSENT = "not recorded"


@dataclass(frozen=True)
class Row:
    """One peer of a case.

    Attributes:
        seconds: a step's median time; None if the peer was not measured.
        ratio: its time divided by that of ours in the same round; None where ours has none.
        peak_bytes: peak memory above the inputs; None if not measured.
        reason: why the peer was not measured, or an empty string.
    """

    seconds: float | None
    ratio: float | None
    peak_bytes: float | None
    reason: str


@dataclass(frozen=True)
class Results:
    """A result file: its machine with all versions, and rows by (op, case) and peer.

    Attributes:
        busy: how many cases were measured while other programs ran.
    """

    file: Path
    machine: Mapping[str, str]
    cases: Mapping[tuple[str, str], Mapping[str, Row]]
    busy: int


@dataclass(frozen=True)
class Change:
    """A row of ours in the first file (A) and in the second (B).

    Attributes:
        reference: the peer that the times of both runs are divided by, or None if there is none.
        relative: our time divided by the reference's, in A and in B; None without a reference.
        reference_time: the reference's seconds in B divided by those in A; None without one.
    """

    op: str
    case: str
    peer: str
    before: Row
    after: Row
    reference: str | None
    relative: tuple[float, float] | None
    reference_time: float | None

    def time(self, by: str) -> float | None:
        """Return how many times as long B takes as A, by ``"ratio"`` or by ``"time"``."""
        if by == "time":
            assert self.before.seconds is not None
            assert self.after.seconds is not None
            return self.after.seconds / self.before.seconds
        return None if self.relative is None else self.relative[1] / self.relative[0]

    @property
    def memory(self) -> float | None:
        """The memory of B as a multiple of that of A; 1 where they differ by noise alone."""
        before, after = self.before.peak_bytes, self.after.peak_bytes
        if before is None or after is None:
            return None
        if abs(after - before) <= MEMORY_NOISE:
            return 1.0
        return after / before if before else math.inf

    def losses(self, by: str, tolerance: float) -> list[str]:
        """Return what B loses by more than the tolerance: time, memory, both or nothing."""
        found = {"time": self.time(by), "memory": self.memory}
        return [f"{what} {n:.2f}×" for what, n in found.items() if n and n > 1 + tolerance]


@dataclass
class Comparison:
    """The outcome of `compare`.

    Attributes:
        changes: our rows that both files measured.
        lost: lines on our rows that A measured and B, which has their cases, did not: losses too.
        only_in_before: the number of cases that only A has.
        uncompared: lines on our rows that A did not measure, and on cases that one file has alone.
        warnings: lines on what else differs.
    """

    changes: list[Change] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    only_in_before: int = 0
    uncompared: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def read(file: Path) -> Results:
    """Return the results in a file that the benchmarks wrote.

    Raises:
        ValueError: naming the file and the key, for a file that is no such result.
    """
    content = _object(file, "its content", read_json(file, most=MAX_BYTES))
    came = content.get("format", FORMAT)
    if came != FORMAT or isinstance(came, bool):
        raise ValueError(
            f"{file}: format must be {FORMAT}, got {came!r:.40}: compare it with the release that "
            "wrote it"
        )
    machine = _object(file, "machine", content.get("machine"))
    found: dict[str, str] = {}
    for key in (*KIND, *NOTED):
        value = content.get(key) if key == "commit" else machine.get(key)
        if value is not None:
            found[key] = _text(file, f"machine.{key}", value, (str, int))
    if "processor" not in found:
        raise ValueError(f"{file}: machine.processor is missing, so its machine is not known")
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    busy = 0
    for where, case in _objects(file, "cases", content.get("cases")):
        op = _text(file, f"{where}.op", case.get("op"))
        name = _text(file, f"{where}.name", case.get("name"))
        if (op, name) in cases:
            raise ValueError(f"{file}: {where} is the second case {name!r} of {op}")
        reason = case.get("not_measured") or case.get("problem")
        rows = cases[op, name] = {}
        for place, row in _objects(file, f"{where}.peers", case.get("peers")):
            peer = _text(file, f"{place}.peer", row.get("peer"))
            if peer in rows:
                raise ValueError(f"{file}: {place} is the second peer {peer!r} of its case")
            rows[peer] = _row(file, place, row)
        if not rows:
            rows[OURS] = Row(None, None, None, _reason(reason))
        busy += case.get("idle") is False
    return Results(file, found, cases, busy)


def _row(file: Path, place: str, row: Mapping[str, Any]) -> Row:
    seconds = _number(file, f"{place}.seconds", row.get("seconds"))
    ratio = _number(file, f"{place}.ratio", row.get("ratio"))
    peak = _number(file, f"{place}.peak_bytes", row.get("peak_bytes"), zero=True)
    if seconds is None and "not_measured" not in row:
        raise ValueError(f"{file}: {place} must have either seconds or not_measured, got neither")
    return Row(seconds, ratio, peak, "" if seconds else _reason(row.get("not_measured")))


def _reason(value: object) -> str:
    """Return a reason as one printable line."""
    text = value if isinstance(value, str) and value.strip() else "no reason is given"
    first = text.strip().splitlines()[0][:200]
    return "".join(c if c.isprintable() else "?" for c in first)


def _object(file: Path, name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{file}: {name} must be a JSON object, got {_kind(value)}")
    return value


def _objects(file: Path, name: str, value: object) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not isinstance(value, list):
        raise ValueError(f"{file}: {name} must be a list, got {_kind(value)}")
    for index, each in enumerate(value):
        where = f"{name}[{index}]"
        yield where, _object(file, where, each)


def _text(file: Path, name: str, value: object, kinds: tuple[type, ...] = (str,)) -> str:
    text = str(value) if isinstance(value, kinds) and not isinstance(value, bool) else ""
    if not text or not text.isprintable() or len(text) > 200:
        raise ValueError(f"{file}: {name} must be a short printable text, got {_kind(value)}")
    return text


def _number(file: Path, name: str, value: object, *, zero: bool = False) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{file}: {name} must be a number, got {_kind(value)}")
    if not (0 <= value < 1e30) or (value == 0 and not zero):  # NaN is not in the interval
        least = "≥ 0" if zero else "> 0"
        raise ValueError(f"{file}: {name} must be finite and {least}, got {_kind(value)}")
    return float(value)


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    try:
        shown = f"{value!r:.40}"
    except ValueError:  # an integer of more digits than Python prints
        shown = "a very long number"
    return f"{type(value).__name__} {shown}"


def compare(
    before: Results,
    after: Results,
    *,
    reference: str | None = None,
    across_machines: bool = False,
) -> Comparison:
    """Compare two results, case by case and op by op.

    Args:
        before, after: the results A and B.
        reference: the peer whose time in the same run ours is divided by; by default the op's
            floor, or where one file lacks it, the first peer that both measured.
        across_machines: whether results of different kinds of machines are compared.

    Returns:
        The changes, in the order of the first file.

    Raises:
        ValueError: if the machines differ, unless ``across_machines``; or if nothing can be
            compared.
    """
    found = Comparison()
    for key in (*KIND, *NOTED):
        a, b = (each.machine.get(key, ABSENT) for each in (before, after))
        if a != b:
            line = f"{key} is {a!r} in A and {b!r} in B"
            if key in KIND and not across_machines:
                raise ValueError(
                    f"{before.file} and {after.file} are of different machines: {line}; "
                    "--across-machines compares them anyway"
                )
            found.warnings.append(line)
    for name, each in (("A", before), ("B", after)):
        if each.busy:
            found.warnings.append(
                f"{each.busy} of {len(each.cases)} cases of {name} were measured while other "
                "programs ran"
            )
    common = [key for key in before.cases if key in after.cases]
    if not common:
        raise ValueError(f"{before.file} and {after.file} have no case in common")
    if reference is not None and not any(
        reference in each.cases[key] for key in common for each in (before, after)
    ):
        known = sorted({peer for key in common for peer in before.cases[key]} - {OURS})
        raise ValueError(f"--reference must be a peer such as {known}, got {reference!r}")
    for each_case in common:
        sides = before.cases[each_case], after.cases[each_case]
        _compare_case(found, each_case, *sides, reference)
    if not found.changes and not found.lost:
        raise ValueError(
            f"{before.file} and {after.file} share no row of ours that both measured: "
            f"{found.uncompared[0]}"
        )
    for name, each, other in (("A", before, after), ("B", after, before)):
        missing = (key for key in each.cases if key not in other.cases)
        found.uncompared += [f"{op}, {case}: only in {name}" for op, case in missing]
    found.only_in_before = len(before.cases) - len(common)
    return found


def _compare_case(
    found: Comparison,
    key: tuple[str, str],
    before: Mapping[str, Row],
    after: Mapping[str, Row],
    reference: str | None,
) -> None:
    chosen = _reference(before, after, reference)
    for peer in dict.fromkeys([*before, *after]):
        if peer.partition(",")[0] != OURS:
            continue
        none = Row(None, None, None, "it has no such row")
        a, b = before.get(peer, none), after.get(peer, none)
        missing = [
            f"not measured in {name}: {row.reason}"
            for name, row in (("A", a), ("B", b))
            if row.seconds is None
        ]
        if missing:
            lines = found.uncompared if a.seconds is None else found.lost
            lines.append(f"{key[0]}, {key[1]}, {peer}: {'; '.join(missing)}")
            continue
        relative = reference_time = None
        if chosen is not None:
            pairs = ((a, before[chosen]), (b, after[chosen]))
            shares = [row.ratio / other.ratio for row, other in pairs if row.ratio and other.ratio]
            relative = (shares[0], shares[1]) if len(shares) == 2 else None
            old, new = before[chosen].seconds, after[chosen].seconds
            reference_time = new / old if old and new else None
        floor = chosen if relative else None
        found.changes.append(Change(*key, peer, a, b, floor, relative, reference_time))


def _reference(
    before: Mapping[str, Row], after: Mapping[str, Row], wanted: str | None
) -> str | None:
    """Return the peer that both runs measured beside ours, or None."""
    peers = [
        peer
        for peer, row in before.items()
        if row.ratio and peer in after and after[peer].ratio and peer.partition(",")[0] != OURS
    ]
    if wanted is not None:
        return wanted if wanted in peers else None
    return next((peer for peer in FLOORS if peer in peers), peers[0] if peers else None)


def reference_warnings(
    comparison: Comparison, tolerance: float, *, chosen: bool = False
) -> list[str]:
    """Return a line for each case whose ratios say less than they seem to.

    Args:
        comparison: the outcome of `compare`.
        tolerance: the share by which the reference's own time may differ between A and B.
        chosen: whether the caller named the reference, which then need not be the floor.
    """
    lines = []
    for change in comparison.changes:
        where = f"{change.op}, {change.case}"
        if change.reference is None:
            continue
        if not chosen and change.reference not in FLOORS:
            lines.append(
                f"{where}: its floor was not measured in both, so {change.reference!r} is the "
                "reference"
            )
        moved = change.reference_time
        if moved is not None and max(moved, 1 / moved) > 1 + tolerance:
            lines.append(
                f"{where}: the time of {change.reference!r} itself is {moved:.2f}× as long in B, "
                "so ratios to it say less"
            )
    return list(dict.fromkeys(lines))  # rows of a case share them


def table(comparison: Comparison, by: str, tolerance: float) -> list[str]:
    """Return the lines of a table: each case, and below it our rows in A and in B."""
    lines, cells = [], []
    for change in comparison.changes:
        cells.append((change, _cells(change, by, tolerance)))
    widths = [max(len(row[i]) for _, row in cells) for i in range(4)] if cells else []
    last = None
    for change, row in cells:
        if (change.op, change.case) != last:
            last = change.op, change.case
            lines.append(f"{change.op}, {change.case}")
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  " + "  ".join([*padded, row[4]]).rstrip())
    return lines


def _cells(change: Change, by: str, tolerance: float) -> list[str]:
    before, after = change.before, change.after
    assert before.seconds is not None
    assert after.seconds is not None
    cells = [
        change.peer,
        f"{duration(before.seconds)} → {duration(after.seconds)} ({change.time('time'):.2f}×)",
    ]
    if change.relative is None:
        cells.append("no peer was measured in both")
    else:
        a, b = change.relative
        cells.append(f"{a:.2f} → {b:.2f} × {change.reference} ({b / a:.2f}×)")
    if before.peak_bytes is None or after.peak_bytes is None:
        cells.append("memory not measured")
    else:
        a, b = before.peak_bytes / 2**20, after.peak_bytes / 2**20
        cells.append(f"{a:,.0f} → {b:,.0f} MiB ({change.memory:.2f}×)")
    losses = change.losses(by, tolerance)
    return [*cells, f"LOSS: {', '.join(losses)}" if losses else ""]


def duration(seconds: float) -> str:
    """Return a short time with its unit: "2.03 s", "5.35 ms", "12.1 µs"."""
    for unit, scale in (("µs", 1e6), ("ms", 1e3)):
        value = float(f"{seconds * scale:.3g}")  # the rounded one decides about the unit
        if value < 1000:
            return f"{value:g} {unit}"
    return f"{seconds:.2f} s"


def any_loss(comparison: Comparison, by: str, tolerance: float) -> bool:
    """Return whether B loses a row, or time or memory of one.

    Raises:
        ValueError: if it loses nothing, but no row has times that can be compared.
    """
    rows = comparison.changes
    if comparison.lost or any(change.losses(by, tolerance) for change in rows):
        return True
    if all(change.time(by) is None for change in rows):
        raise ValueError(
            f"nothing can be judged: none of {len(rows)} rows of ours has a reference that both "
            "files measured; --by time compares the times themselves"
        )
    return False


def conclusion(comparison: Comparison, by: str, tolerance: float) -> str:
    """Return one line that says how many rows lose time or memory, or were not measured again."""
    rows, lost = comparison.changes, len(comparison.lost)
    lost += sum(bool(change.losses(by, tolerance)) for change in rows)
    timed = sum(change.time(by) is not None for change in rows)
    what = "time ÷ a peer's in the same run" if by == "ratio" else "time"
    return (
        f"{lost} of {len(rows) + len(comparison.lost)} rows lose over {tolerance:.0%} of {what}, "
        f"or of memory, or are not in B; {len(rows) - timed} have no such time, "
        f"{len(comparison.uncompared)} are not compared; {comparison.only_in_before} cases are "
        "only in A"
    )
