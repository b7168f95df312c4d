"""Runs on a machine with a GPU share options, a time limit, the build, and a result file."""

from __future__ import annotations

import argparse
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch

from .process import ROOT, run_limited, slug, write_json

# The share of a run's time that its build may take.
BUILD_SHARE = 0.4


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that every run has."""
    found = argparse.ArgumentParser(description=doc.split("\n")[0] if doc else None)
    found.add_argument("--dry", action="store_true", help="Run on the CPU with tiny sizes.")
    found.add_argument("--output", type=Path, help="Result file, by default of the device's name.")
    found.add_argument("--seconds", type=float, help="Time limit of the whole run.")
    return found


def output_of(args: argparse.Namespace, target: str, folder: Path) -> Path:
    """Return a run's result file; exit the program without a GPU, unless the run is a dry one."""
    if not args.dry and not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} sees no GPU; try the CPU with: make {target} DRY=1")
    stem = "dry-run" if args.dry else slug(torch.cuda.get_device_name())
    return args.output or folder / f"{stem}.json"


class Evidence:
    """A run's result file, its time, and what went wrong so far.

    Args:
        target: of the Makefile.
        dry: whether it runs on the CPU.
        output: the result file. budget: seconds of the whole run.
    """

    def __init__(self, target: str, dry: bool, output: Path, budget: float) -> None:
        self.dry, self.output, self.budget = dry, output, budget
        self.end = time.monotonic() + budget
        self.problems: list[str] = []
        self.result: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d"),
            "command": f"make {target}" + (" DRY=1" if dry else ""),
            "machine": {"not_measured": "not reached"},
        }

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.end - time.monotonic()

    def save(self) -> None:
        """Write the results so far."""
        write_json(self.output, self.result)

    def build(self) -> None:
        """Build the extensions, in a dry run only where they are missing or old."""
        print("building", flush=True)
        self.result["build"] = build(BUILD_SHARE * self.budget, if_old=self.dry)
        if problem := self.result["build"]["problem"]:
            self.problems.append(f"build: {problem}")
        self.save()

    def finish(self) -> None:
        """Say where the results are; exit the program with what went wrong, if anything did."""
        print(f"written: {self.output.name}, {self.budget - self.left():.0f} s")
        if self.problems:
            sys.exit("\n".join(["not all went well:", *self.problems]))


def build(seconds: float, *, if_old: bool) -> dict[str, Any]:
    """Build the extensions; return how that failed, or None, as ``problem``, and its ``seconds``.

    Args:
        seconds: the time limit.
        if_old: build only where an extension is missing or older than its sources.
    """
    began, problem = time.monotonic(), None
    if not (if_old and _is_built()):
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        problem = run_limited(command, seconds, stdout=sys.stderr)
    return {"problem": problem, "seconds": round(time.monotonic() - began, 1)}


def _is_built() -> bool:
    """Return whether this interpreter's extensions exist and are newer than their sources."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    built = [ROOT / "synface_kernels" / f"{name}{suffix}" for name in ("_C", "_numpy")]
    if not all(file.exists() for file in built):
        return False
    sources = [ROOT / "setup.py", *ROOT.glob("csrc/**/*")]
    newest = max(file.stat().st_mtime for file in sources)
    return min(file.stat().st_mtime for file in built) > newest
