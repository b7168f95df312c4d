"""Run `make gpu-evidence` and `make gpu-training` on the CPU, with a GPU machine's software.

    python tools/stand_in.py FOLDER                    # makes an environment there, by pip
    python tools/stand_in.py FOLDER --python PYTHON    # takes one that is there

Such a machine has older and newer packages than a developer's, and lacks most optional ones, so
that a run there can end before it has measured anything. FOLDER keeps the environment, a copy of
the sources and their build for the next time. The exit status is 0 where those of both dry runs are
0 and every dry case, profile, sweep, set of blocks and replay is measured. On the CPU it takes
minutes; with a GPU in the machine it does not use it.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PYTHON = "python3.12"
PACKAGES = [
    *("torch==2.11.0", "triton==3.6.0", "numpy==2.5.*"),
    *("pytest>=8", "pytest-xdist", "setuptools>=77", "wheel", "pybind11>=2.13", "ninja"),
    *("typer", "rich", "pillow", "safetensors", "matplotlib", "scikit-image", "scipy"),
    "markdown-it-py",
]
ABSENT = [
    *("webdataset", "tomli_w", "pytorch_metric_learning", "faiss", "pykeops", "liger_kernel"),
    *("cut_cross_entropy", "expecttest"),
]
# What a result has beside its cases.
KINDS = ("profiles", "sweeps", "blocks", "replays")
# Read by Python when it starts, where its folder is on PYTHONPATH.
BLOCKER = """
from importlib.machinery import PathFinder

usual = PathFinder.find_spec


def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in {names!r} else usual(name, path, target)


PathFinder.find_spec = classmethod(find_spec)
"""


def block(folder: Path, names: Iterable[str] = ABSENT) -> Path:
    """Write a folder for PYTHONPATH with which Python and its children cannot import the names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(BLOCKER.format(names=sorted(names)))
    return folder


def make_environment(folder: Path) -> Path:
    """Install the machine's packages into a new virtual environment; return its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        # A launcher of that name may be on PATH without a Python behind it.
        base = shutil.which(PYTHON)
        if base is None or subprocess.run([base, "--version"], check=False).returncode:
            sys.exit(f"needs a {PYTHON} on PATH that runs, or --python")
        subprocess.run([base, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *PACKAGES], check=True)
    return python


def copy_sources(to: Path) -> None:
    """Copy the files of the working tree that changed; leave what was built there."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    wanted = {name for name in listed if name and (ROOT / name).is_file()}
    for file in to.rglob("*"):
        name = file.relative_to(to)
        built = name.parts[0] == "build" or name.suffix == ".so"
        if file.is_file() and not built and str(name) not in wanted:
            file.unlink()
    for name in wanted:
        target = to / name
        if not target.exists() or not filecmp.cmp(ROOT / name, target, shallow=False):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)


def environment(python: Path, blocked: Path) -> dict[str, str]:
    """Return the variables of the run; torch.compile of the peers would take minutes."""
    kept = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    given = {
        "PYTHONPATH": str(blocked),
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return {"TORCH_COMPILE_DISABLE": "1"} | kept | given


def unmeasured(result: dict[str, Any]) -> list[str]:
    """Return what of a result was not measured, of what a dry run has."""
    missing = [kind for kind in KINDS if not result.get(kind)]
    rows = [(case, next(iter(case["peers"]), case)) for case in result["cases"]]
    for row in (row for kind in KINDS for row in result.get(kind, [])):
        parts = [row, *row.get("settings", []), row.get("together", row)]
        rows += [(row, part) for part in parts]
    missing += [
        f"{about['op']}, {about['name']}: {row['not_measured']}"
        for about, row in rows
        if "not_measured" in row
    ]
    return missing


def dry_run(
    target: str, folder: Path, python: Path, variables: dict[str, str], tests: Path | None = None
) -> tuple[int, dict[str, Any]]:
    """Run a target of the Makefile in the copied sources; return its exit status and its results.

    Args:
        tests: another folder of GPU tests.
    """
    output = folder / f"{target}.json"
    output.unlink(missing_ok=True)
    options = f"--output {output}" + (f" --tests {tests.resolve()}" if tests else "")
    command = ["make", target, "DRY=1", f"PYTHON={python}", f"EVIDENCE={options}"]
    done = subprocess.run(command, cwd=folder / "sources", env=variables, check=False)
    if not output.exists():
        sys.exit(f"make {target} ended with status {done.returncode} and wrote no results")
    return done.returncode, json.loads(output.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="Folder to make the environment and copy in.")
    parser.add_argument("--python", type=Path, help="Python of an environment that is there.")
    parser.add_argument("--tests", type=Path, help="Another folder of GPU tests.")
    args = parser.parse_args()
    folder = args.folder.resolve()
    python = args.python.absolute() if args.python else make_environment(folder / "environment")
    variables = environment(python, block(folder / "blocked"))
    copy_sources(folder / "sources")
    ran, result = dry_run("gpu-evidence", folder, python, variables, args.tests)
    trained, _ = dry_run("gpu-training", folder, python, variables)
    missing = unmeasured(result)
    versions = (f"{k} {result['machine'].get(k)}" for k in ("python", "torch", "triton", "numpy"))
    print(f"stand-in: {', '.join(versions)}")
    print(f"cases: {len(result['cases'])}; not measured: {missing or 'none'}")
    for op, tests in result["tests"].get("ops", {}).items():
        counts = ", ".join(f"{tests[kind]} {kind}" for kind in ("passed", "skipped", "failed"))
        print(f"{op}: {counts}")
    sys.exit(ran or trained or bool(missing))


if __name__ == "__main__":
    main()
