"""A pytest plugin that writes each test's result as soon as it is known, one JSON object a line.

``python -m pytest -p benchmarks.pytest_results --results FILE``: a run that is ended leaves the
results until then. With pytest-xdist the controlling process writes them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

# Characters of a failure's message that are kept.
MESSAGE_MAX = 600


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--results", type=Path, help="File to write each test's result to.")


def pytest_configure(config: Any) -> None:
    file = config.getoption("--results")
    if file is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Writer(file), "benchmarks_results")


class _Writer:
    def __init__(self, file: Path) -> None:
        self.file = file
        file.write_text("")

    def _write(self, report: Any, outcome: str) -> None:
        name = report.nodeid or Path(str(report.fspath)).name
        line = {"test": name, "outcome": outcome}
        line["seconds"] = round(getattr(report, "duration", 0.0), 2)
        if outcome == "failed":
            line["message"] = _message(report.longrepr)
        with self.file.open("a") as opened:
            opened.write(json.dumps(line) + "\n")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            self._write(report, report.outcome)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._write(report, "failed")


def _message(failure: Any) -> str:
    """Return the error of a failed test, with its place, or the end of what pytest shows."""
    crash = getattr(failure, "reprcrash", None)
    if crash is None:
        return without_folders(str(failure).strip())[-MESSAGE_MAX:]
    message = f"{Path(crash.path).name}:{crash.lineno}: {crash.message}"
    return without_folders(message)[:MESSAGE_MAX]


def without_folders(text: str) -> str:
    """Return a text whose absolute paths are only names: results are published."""
    return re.sub(r"(?<![\w.])/(?:[\w.+@-]+/)+", "", text)
