"""Runs of an op's tests before it is timed: no speed is reported for a wrong answer."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

from .cases import CASES
from .process import ROOT, run_limited

GPU_TESTS = ROOT / "tests" / "gpu"
# The failures whose messages are kept.
FAILURES_MAX = 20
# Processes of one test file, where there are cores for them.
WORKERS_MAX = 4


@dataclass
class Outcome:
    """Counts of test results; ``passed_by`` are the names of the tests that passed.

    Attributes:
        problem: how the run itself failed, or None.
        failures: the first failed tests, with short messages.
    """

    passed: int = 0
    skipped: int = 0
    failed: int = 0
    seconds: float = 0.0
    problem: str | None = None
    failures: list[dict[str, str]] = field(default_factory=list)
    passed_by: list[str] = field(default_factory=list, repr=False)

    def speaks_for(self, op: str) -> bool:
        """Return whether nothing failed, and a test with the op's name passed."""
        return not self.failed and not self.problem and any(op in name for name in self.passed_by)

    def summary(self) -> dict[str, Any]:
        """Return the counts, without the names."""
        found = asdict(self)
        del found["passed_by"]
        return found

    def add(self, other: Outcome) -> None:
        """Count another run's results too."""
        self.passed += other.passed
        self.skipped += other.skipped
        self.failed += other.failed
        self.seconds = round(self.seconds + other.seconds, 1)
        self.problem = "; ".join(filter(None, (self.problem, other.problem))) or None
        self.failures = (self.failures + other.failures)[:FAILURES_MAX]
        self.passed_by += other.passed_by


def run_tests(
    arguments: list[str],
    seconds: float = float("inf"),
    environment: Mapping[str, str] | None = None,
    *,
    under: Sequence[str] = (),
    stdout: Any = None,
) -> Outcome:
    """Run pytest with these arguments, in a process of its own, with a time limit.

    Where the arguments do not say how many processes run the tests, all cores do.
    The tests of a run that is ended at the limit are counted until then.

    Args:
        under: a command that runs pytest's, such as a memory checker; then in one process.
        stdout: where pytest prints, by default this process's stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.jsonl"
        plugin = ["-p", "benchmarks.pytest_results", "--results", str(results)]
        if "-n" not in arguments and not under and find_spec("xdist") is not None:
            plugin += ["-n", "auto", "--dist", "worksteal"]
        pytest = [sys.executable, "-m", "pytest", "-q", "--tb=short", *plugin, *arguments]
        problem = run_limited(
            [*under, *pytest],
            seconds,
            stdout=stdout or sys.stderr,
            env={**os.environ, **(environment or {})},
        )
        if not results.exists():
            return Outcome(problem=problem or "pytest wrote no results")
        lines = results.read_text().splitlines()
    outcome = Outcome()
    # A killed process may have written part of a line; a test may fail again when it is torn down.
    found: dict[str, dict[str, Any]] = {}
    for line in filter(lambda line: line.endswith("}"), lines):
        result = json.loads(line)
        if found.get(result["test"], {}).get("outcome") != "failed":
            found[result["test"]] = result
    for name, result in found.items():
        outcome.seconds += result["seconds"]
        setattr(outcome, result["outcome"], getattr(outcome, result["outcome"]) + 1)
        if result["outcome"] == "passed":
            outcome.passed_by.append(name)
        elif result["outcome"] == "failed" and len(outcome.failures) < FAILURES_MAX:
            outcome.failures.append({"test": name, "message": result["message"]})
    outcome.seconds = round(outcome.seconds, 1)
    ended = problem is not None and "was ended" in problem
    if ended or (not outcome.failed and not outcome.passed and not outcome.skipped):
        outcome.problem = problem or "pytest ran no test"
    elif problem is not None and not outcome.failed:
        outcome.problem = problem
    return outcome


def op_of(file: Path) -> str:
    """Return the op that a file of GPU tests is of, by its name."""
    stem = file.stem.removeprefix("test_gpu_")
    named = [op for op in CASES if stem == op or stem.startswith(f"{op}_")]
    return max(named, key=len, default=stem)


def run_gpu_tests(
    seconds: float,
    *,
    folder: Path = GPU_TESTS,
    interpreted: bool = False,
    report: Callable[[dict[str, Outcome]], None] = lambda outcomes: None,
) -> dict[str, Outcome]:
    """Run each file of GPU tests in a process of its own, side by side; return an outcome per op.

    A file that fails, or that cannot be collected, says nothing about the others.

    Args:
        seconds: the time limit of all of them.
        folder: where the files are.
        interpreted: run them on the CPU, in Triton's interpreter, with tiny shapes.
        report: is called with the outcomes so far after each file.
    """
    files = sorted(folder.glob("test_gpu_*.py"))
    cores = len(os.sched_getaffinity(0))
    together = min(len(files), cores) or 1
    arguments = ["-p", "no:cacheprovider", f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml")]
    workers = min(WORKERS_MAX, 3 * cores // (2 * together))  # they also wait for the GPU
    if find_spec("xdist") is not None:  # one worker would only be another process to start
        arguments += ["-n", str(workers if workers > 1 else 0), "--dist", "worksteal"]
    # The processes share the cores.
    environment = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    environment["TORCH_COMPILE_DISABLE"] = "0"
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    outcomes: dict[str, Outcome] = {}
    lock = Lock()

    def run(file: Path) -> None:
        outcome = run_tests([str(file), *arguments], seconds, environment)
        with lock:
            outcomes.setdefault(op_of(file), Outcome()).add(outcome)
            report(outcomes)

    with ThreadPoolExecutor(together) as threads:
        list(threads.map(run, files))
    return outcomes


def verify(op: str, seconds: float = float("inf")) -> Outcome:
    """Run the op's own tests, every file of its name, within a time limit."""
    return run_tests(sorted(map(str, (ROOT / "tests" / "ops").glob(f"test_{op}*.py"))), seconds)


def require(op: str, seconds: float = float("inf")) -> Outcome:
    """Run the op's own tests; exit the program where they do not pass within the time limit."""
    outcome = verify(op, max(seconds, 0.0))
    if not outcome.speaks_for(op):
        if not outcome.failed and outcome.problem and "was ended after" in outcome.problem:
            sys.exit(
                f"{op}: the time was over before its tests ended ({outcome.summary()}), so nothing "
                "is timed"
            )
        sys.exit(f"{op}: its tests do not pass ({outcome.summary()}), so nothing is timed")
    return outcome


def main() -> None:
    for op in sys.argv[1:] or CASES:
        print(f"{op}: {require(op).summary()}")


if __name__ == "__main__":
    main()
