"""Runs of an op's tests before it is timed: no speed is reported for a wrong answer."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from .cases import CASES
from .process import ROOT, run_limited


@dataclass
class Outcome:
    """Counts of test results; ``passed_by`` are the names of the tests that passed."""

    passed: int = 0
    skipped: int = 0
    failed: int = 0
    seconds: float = 0.0
    problem: str | None = None
    passed_by: list[str] = field(default_factory=list, repr=False)

    def speaks_for(self, op: str) -> bool:
        """Return whether nothing failed, and a test with the op's name passed."""
        return not self.failed and not self.problem and any(op in name for name in self.passed_by)

    def summary(self) -> dict[str, Any]:
        """Return the counts, without the names."""
        found = asdict(self)
        del found["passed_by"]
        return found


def run_tests(arguments: list[str], seconds: float = float("inf")) -> Outcome:
    """Run pytest with these arguments, in a process of its own, with a time limit."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *arguments]
        problem = run_limited(command, seconds, stdout=sys.stderr)
        outcome = Outcome()
        if not report.exists():
            outcome.problem = problem or "pytest wrote no report"
            return outcome
        suite = ElementTree.parse(report).getroot()
    for test in suite.iter("testcase"):
        kinds = {child.tag for child in test}
        if kinds & {"failure", "error"}:
            outcome.failed += 1
        elif "skipped" in kinds:
            outcome.skipped += 1
        else:
            outcome.passed += 1
            outcome.passed_by.append(f"{test.get('classname')}.{test.get('name')}")
        outcome.seconds += float(test.get("time", 0))
    outcome.seconds = round(outcome.seconds, 1)
    return outcome


def verify(op: str) -> Outcome:
    """Run the op's own tests: every file of its name."""
    return run_tests(sorted(map(str, (ROOT / "tests" / "ops").glob(f"test_{op}*.py"))))


def require(op: str) -> Outcome:
    """Run the op's own tests; exit the program where they do not pass."""
    outcome = verify(op)
    if not outcome.speaks_for(op):
        sys.exit(f"{op}: its tests do not pass ({outcome.summary()}), so nothing is timed")
    return outcome


def main() -> None:
    for op in sys.argv[1:] or CASES:
        print(f"{op}: {require(op).summary()}")


if __name__ == "__main__":
    main()
