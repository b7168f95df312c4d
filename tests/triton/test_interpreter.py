"""Runs each file of interpreted/ in a process where Triton is the interpreter."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).parent
FILES = sorted((HERE / "interpreted").glob("test_*.py"))


class Child(NamedTuple):
    process: subprocess.Popen[bytes]
    report: Path
    output: Path


@pytest.fixture(scope="module")
def children(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Path, Child]]:
    """Start the processes of all files that are asked for, side by side: each uses one core."""
    folder, started = tmp_path_factory.mktemp("interpreted"), {}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    for item in request.session.items:
        if item.path != Path(__file__) or not isinstance(item, pytest.Function):
            continue
        file = item.callspec.params["file"]
        report, output = folder / f"{file.stem}.xml", folder / f"{file.stem}.txt"
        with output.open("wb") as opened:  # a pipe that nobody reads yet might fill
            process = subprocess.Popen(
                [*command, f"--junitxml={report}", str(file)],
                cwd=HERE.parents[1],
                env=os.environ | {"TRITON_INTERPRET": "1"},
                stdout=opened,
                stderr=subprocess.STDOUT,
            )
        started[file] = Child(process, report, output)
    yield started
    for child in started.values():
        child.process.kill()
        child.process.wait()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem.removeprefix("test_"))
@pytest.mark.slow
def test_interpreted_kernels(file: Path, children: dict[Path, Child]) -> None:
    process, report, output = children[file]
    code = process.wait()
    assert code == 0, output.read_text()
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    assert int(suite.attrib["tests"]) > 0
    assert int(suite.attrib["skipped"]) == 0, output.read_text()
