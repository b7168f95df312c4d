"""`make bench`: verify each op, measure its cases on the CPU, print and write the results.

The call ends after `--minutes`, whatever hangs: what would begin later is not measured.

Until all is measured, the results are in a file of the same name and `.partial`; an interrupted
call leaves it there.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from . import machine, table
from .cases import CASES, HEADLINES, cases
from .isolated import PEER_SECONDS, run_case
from .process import RESULTS, ROUNDS, check_output, command_line, partial, run_child, write_json
from .verify import require

FORMAT = 1  # of result files
MINUTES = 120.0
CEILING_SECONDS = 120.0


def main(op: str | None = None) -> None:
    """Benchmark all ops, or one; only results of all are written to benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=["cpu", "dry"], default="cpu")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--headline", action="store_true", help="Only the headline cases.")
    parser.add_argument(
        "--peer-seconds",
        type=float,
        default=PEER_SECONDS,
        help="Limit of a peer's rounds in one case; a slower peer is not measured.",
    )
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="Limit of the whole call, tests included."
    )
    parser.add_argument(
        "--output", type=Path, help="Result file, instead of one in benchmarks/results."
    )
    args = parser.parse_args()
    ops = [op] if op else list(CASES)
    end = time.monotonic() + 60 * args.minutes

    described = machine.describe(torch.device("cpu"))
    output = args.output
    if output is None and op is None:
        stem = "dry-run" if args.suite == "dry" else machine.file_stem(described)
        output = RESULTS / f"{stem}.json"
    if output is not None:
        try:
            check_output(output)
        except ValueError as error:
            parser.error(str(error))
    result: dict[str, Any] = {
        "format": FORMAT,
        "machine": described,
        "commit": machine.commit(),
        "date": time.strftime("%Y-%m-%d"),
        "command": command_line(f"benchmarks.bench_{op}" if op else "benchmarks.run"),
        "verified": {},
        "cases": [],
    }
    for name in ops:
        result["verified"][name] = require(name, end - time.monotonic()).summary()
    left = max(0.0, end - time.monotonic())
    ceilings = ["benchmarks.ceilings", args.suite]
    result["ceilings"] = run_child(ceilings, min(CEILING_SECONDS, left))
    for name in ops:
        for case in cases(args.suite, name)[: HEADLINES[name] if args.headline else None]:
            print(f"measuring {name}, {case.name}", file=sys.stderr)
            measured = run_case(
                case,
                args.rounds,
                peer_seconds=args.peer_seconds,
                seconds=end - time.monotonic(),
            )
            result["cases"].append(measured)
            print(table.one_case(measured), flush=True)
            if output is not None:
                write_json(partial(output), result)

    if output is not None:
        partial(output).replace(output)
        print(f"written: {output.name}")


if __name__ == "__main__":
    main()
