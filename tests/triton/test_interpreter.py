"""Runs the files of interpreted/ in processes where Triton is the interpreter."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted((HERE / "interpreted").glob("test_*.py"))
# Two processes, for two cores: each one starts torch and Triton anew, which takes seconds.
MARGIN = [file for file in FILES if file.stem.startswith("test_margin_cross_entropy")]
GROUPS = {"margin_cross_entropy": MARGIN, "others": [file for file in FILES if file not in MARGIN]}


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.slow
@pytest.mark.timeout(1800)  # with --pairs none, all cases of several files
def test_interpreted_kernels(group: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    report, files = tmp_path / "report.xml", GROUPS[group]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    command += ["--pairs", pytestconfig.getoption("--pairs")]
    done = subprocess.run(
        [*command, f"--junitxml={report}", *map(str, files)],
        cwd=HERE.parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    modules = {case.attrib["classname"].rpartition(".")[2] for case in suite.iter("testcase")}
    assert modules == {file.stem for file in files}
    assert int(suite.attrib["skipped"]) == 0, done.stdout
