"""`make gpu-evidence`: the tests and benchmarks that need a GPU, in under eight minutes.

It builds with the Python, torch and compiler of the machine, runs the gpu-marked tests, measures
the two ceilings and every op's cases against their peers, and writes
benchmarks/results/<device>.json. It downloads nothing. Every step has a time limit, and the results
so far are written after each. `--dry` does the same on the CPU, with tiny shapes and with
extensions that are built already.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from . import table
from .cases import CASES, cases
from .process import (
    GRACE_SECONDS,
    RESULTS,
    ROOT,
    run_case,
    run_child,
    run_limited,
    slug,
    write_json,
)
from .verify import run_tests

BUDGET_SECONDS = 450.0
# The shares of the budget that building and testing may take.
BUILD_SHARE, TEST_SHARE = 0.35, 0.35
OPTIONAL = ["pytorch_metric_learning", "triton", "pytest_benchmark"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--dry", action="store_true", help="Run on the CPU with tiny shapes.")
    parser.add_argument(
        "--output", type=Path, help="Result file, instead of benchmarks/results/<device>.json."
    )
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        sys.exit(
            f"torch {torch.__version__} sees no GPU; try the CPU with: make gpu-evidence DRY=1"
        )
    device = torch.device("cpu" if args.dry else "cuda")
    end = time.monotonic() + BUDGET_SECONDS

    def left() -> float:
        return end - time.monotonic()

    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": "make gpu-evidence" + (" DRY=1" if args.dry else ""),
        "cannot_import": [name for name in OPTIONAL if find_spec(name) is None],
    }
    print(f"cannot be imported here: {', '.join(result['cannot_import']) or 'nothing'}")

    print("building", flush=True)
    began, problem = time.monotonic(), None
    if not (args.dry and _is_built()):
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        problem = run_limited(command, BUILD_SHARE * BUDGET_SECONDS, stdout=sys.stderr)
    result["build"] = {"problem": problem, "seconds": round(time.monotonic() - began, 1)}
    result["machine"] = run_child(["benchmarks.machine", "--device", device.type], 60)
    stem = "dry-run" if args.dry else slug(torch.cuda.get_device_name())
    output = args.output or RESULTS / f"{stem}.json"
    write_json(output, result)

    print("gpu-marked tests", flush=True)
    # One file that cannot be collected (for a missing library) must not hide the others.
    arguments = ["-m", "gpu", "--continue-on-collection-errors", str(ROOT / "tests")]
    outcome = run_tests(arguments, TEST_SHARE * BUDGET_SECONDS)
    result["tests"] = outcome.summary()
    print(f"tests: {result['tests']}")
    write_json(output, result)

    print("ceilings", flush=True)
    small = ["--copy-bytes", "1000000", "--size", "64"] if args.dry else []
    result["ceilings"] = run_child(["benchmarks.ceilings", "--device", device.type, *small], 60)
    print(f"ceilings: {result['ceilings']}")
    write_json(output, result)

    result["cases"] = []
    todo = [case for op in CASES for case in cases("dry" if args.dry else "gpu", op)]
    for number, case in enumerate(todo):
        print(f"measuring {case.op}, {case.name}", flush=True)
        unmeasured = {"op": case.op, "name": case.name, "peers": []}
        seconds = (left() - GRACE_SECONDS) / (len(todo) - number)
        if seconds <= 0:
            measured = {**unmeasured, "not_measured": "no time was left"}
        elif outcome.speaks_for(case.op) or (args.dry and not outcome.failed):
            measured = run_case(case, device, rounds=3 if args.dry else 20, seconds=seconds)
            _add_shares(measured, result["ceilings"])
        else:
            why = "no gpu-marked test of this op passed, or one failed"
            measured = {**unmeasured, "not_measured": why}
        result["cases"].append(measured)
        print(table.one_case(measured), flush=True)
        write_json(output, result)
    print(f"written: {output.name}, {BUDGET_SECONDS - left():.0f} s")
    if problem or outcome.failed or outcome.problem:
        sys.exit(f"build: {problem or 'good'}; tests: {outcome.summary()}")


def _is_built() -> bool:
    """Return whether this interpreter's extensions exist and are newer than their sources."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    built = [ROOT / "synface_kernels" / f"{name}{suffix}" for name in ("_C", "_numpy")]
    if not all(file.exists() for file in built):
        return False
    sources = [ROOT / "setup.py", *ROOT.glob("csrc/**/*")]
    newest = max(file.stat().st_mtime for file in sources)
    return min(file.stat().st_mtime for file in built) > newest


def _add_shares(measured: dict[str, Any], ceilings: dict[str, Any]) -> None:
    """Add the share of each ceiling that a peer reaches, by the case's FLOPs and bytes."""
    for row in measured["peers"]:
        for rate, ceiling, share in (
            ("tflop_per_second", "product_tflop_per_second", "share_of_product"),
            ("gigabyte_per_second", "copy_gigabyte_per_second", "share_of_copy"),
        ):
            if rate in row and ceiling in ceilings:
                row[share] = row[rate] / ceilings[ceiling]


if __name__ == "__main__":
    main()
