"""The page that adds an op is followed: its files are written, its commands run, its tests pass."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "add-an-op.md"
BUILT = (".git", ".venv*", ".*cache", ".hypothesis", ".benchmarks", "*.egg-info", "build", "dist")
BUILT += ("__pycache__", "*.so", "runs")
# What a build of one op's kernels needs of csrc; others take minutes to compile.
SHARED = {"common", "gemm", "simd", "torch"}
# Copies an object that `make build` has compiled, and compiles others quickly: the last -O wins.
COMPILER = """#!/bin/sh
for word; do
    case "$word" in -c) compiles=1 ;; *.o) object="$word" ;; esac
done
built="{built}/${{object##*/build/}}"
if test -n "$compiles" && test -f "$built"; then exec cp "$built" "$object"; fi
exec {compiler} "$@" -O0
"""


class Step(NamedTuple):
    """A block of the page: a file's content, a difference to a file, or commands.

    Attributes:
        prints: what the page says below commands that they print.
    """

    kind: str
    file: str | None
    text: str
    prints: str = ""


def steps() -> list[Step]:
    """Return the page's blocks in order; the line above a file's block ends with its name."""
    blocks = r"(?:`([^`\n]+)`:\n\n)?^```(\w+)\n(.*?)^```$(?:\n\nprints `([^`]+)`)?"
    found = re.finditer(blocks, PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [Step(match[2], match[1], match[3], match[4] or "") for match in found]


def changed(text: str, difference: str) -> str:
    """Apply the hunks of a difference, each of which fits in one place.

    "…" in a line of context stands for any characters of that line.
    """
    for hunk in difference.split("@@\n")[1:]:
        lines = hunk.splitlines(keepends=True)
        assert all(line[0] in " +" for line in lines), f"a page only adds lines:\n{hunk}"
        parts = []
        for line in lines:
            old = re.escape(line[1:]).replace("…", "[^\n]*")
            parts.append(f"({old})" if line[0] == " " else "()")
        places = [*re.finditer("^" + "".join(parts), text, re.MULTILINE)]
        assert len(places) == 1, f"fits in {len(places)} places:\n{hunk}"
        (place,) = places
        pairs = zip(lines, place.groups(), strict=True)
        new = [old if line[0] == " " else line[1:] for line, old in pairs]
        text = text[: place.start()] + "".join(new) + text[place.end() :]
    return text


def is_built() -> bool:
    """Return whether the extension was linked after the last change of any source of it."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    extension = ROOT / "synface_kernels" / f"_C{suffix}"
    sources = [*(ROOT / "csrc").rglob("*.*"), ROOT / "setup.py"]
    return extension.exists() and all(
        source.stat().st_mtime < extension.stat().st_mtime for source in sources
    )


def environment(tree: Path, folder: Path) -> dict[str, str]:
    """Return the variables under which commands run: the tree's packages, a quick compiler."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    built = ROOT / "build" if is_built() else folder / "nothing"
    scripts = {
        "c++": COMPILER.format(built=built, compiler=compiler),
        "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n',  # this one
    }
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {
        **os.environ,
        "CXX": str(folder / "c++"),
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{tree}:{tree / 'python'}",
        "PYTEST_XDIST_AUTO_NUM_WORKERS": "0",  # more processes take longer to start than the tests
        "SYNFACE_CUDA": "0",
    }


@contextmanager
def one_op(tree: Path, op: str, folder: Path) -> Iterator[None]:
    """Leave only one op's kernels in csrc, so that the others are not compiled."""
    aside = folder / "csrc"
    aside.mkdir()
    for each in sorted((tree / "csrc").iterdir()):
        if each.is_dir() and each.name not in {*SHARED, op}:
            shutil.move(each, aside / each.name)
    nothing = tree / "csrc" / "numpy"  # an extension has at least one source
    nothing.mkdir()
    (nothing / "nothing.cpp").touch()
    try:
        yield
    finally:
        shutil.rmtree(nothing)
        for each in sorted(aside.iterdir()):
            shutil.move(each, tree / "csrc" / each.name)


def run(words: list[str], tree: Path, variables: dict[str, str]) -> str:
    done = subprocess.run(
        words, cwd=tree, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}"
    return done.stdout


def test_the_page_adds_files_and_leaves_those_of_the_library() -> None:
    new = [step.file for step in steps() if step.file and step.kind != "diff"]
    assert len(new) == len(set(new))
    assert not [file for file in new if (ROOT / file).exists()]
    for step in steps():
        if step.kind == "diff":
            assert step.file is not None
            assert not step.file.startswith("csrc/")  # what is built of it is used again below
            text = (ROOT / step.file).read_text()
            assert len(changed(text, step.text)) > len(text)


@pytest.mark.parametrize(
    ("difference", "message"),
    [("@@\n a\n+x\n", "fits in 2 places"), ("@@\n d\n+x\n", "fits in 0"), ("@@\n-b\n", "adds")],
)
def test_a_difference_that_does_not_fit_is_noticed(difference: str, message: str) -> None:
    assert changed("a\nb cd\na\n", "@@\n b …\n+x\n") == "a\nb cd\nx\na\n"
    with pytest.raises(AssertionError, match=message):
        changed("a\nb cd\na\n", difference)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # it compiles
def test_an_op_is_added_as_the_page_says(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    tree, aside = tmp_path / "tree", tmp_path / "aside"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*BUILT))
    for extension in (ROOT / "synface_kernels").glob("*.so"):
        shutil.copy2(extension, tree / "synface_kernels")
    aside.mkdir()
    variables = environment(tree, aside)
    written: list[str] = []
    (op,) = {Path(step.file).parent.name for step in steps() if "/op.py" in (step.file or "")}
    for step in steps():
        if step.kind == "bash":
            compiles = "build_ext" in step.text
            with one_op(tree, op, aside) if compiles else nullcontext():
                printed = run(["bash", "-euc", step.text], tree, variables)
            assert step.prints in printed
        else:
            assert step.file is not None, f"no name above this block:\n{step.text}"
            file = tree / step.file
            if step.kind == "diff":
                file.write_text(changed(file.read_text(), step.text))
            else:
                assert not file.exists()
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(step.text)
            written.append(step.file)
    python = [file for file in written if file.endswith(".py")]
    sources = [file for file in written if file.startswith("csrc/")]
    run(["ruff", "check", *python], tree, variables)
    run(["ruff", "format", "--check", *python], tree, variables)
    run(["clang-format", "--dry-run", "--Werror", *sources], tree, variables)
