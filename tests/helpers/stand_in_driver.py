"""A stand-in for `benchmarks.driver`, without torch, whose peers crash, or hang in a call of C."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import time
from pathlib import Path

HELD_SECONDS = 300


def hold() -> None:
    """Sleep in C for minutes and keep Python's lock, so that no signal handler runs."""
    ctypes.PyDLL(None).sleep(HELD_SECONDS)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", nargs=3)
    parser.add_argument("--rounds")
    parser.add_argument("--alone")
    parser.add_argument("--limit")
    parser.add_argument("--without", type=json.loads)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.case[0] == "never":
        hold()
    names = ("ours", "holds", "crashes", "holds when timed", "absent")
    rows, running = [], args.output.with_name("running")
    for name in [args.alone] if args.alone else names:
        reason = (args.without or {}).get(name) or ("ImportError" if name == "absent" else None)
        if reason:
            rows.append({"peer": name, "not_measured": reason})
            continue
        running.write_text(name)
        if name == "holds" or (name == "holds when timed" and not args.alone):
            # The step seems to have begun long ago, so that nobody waits for its limit.
            began = time.time() - HELD_SECONDS
            os.utime(running, (began, began))
            hold()
        if name == "crashes":
            os.abort()
        rows.append({"peer": name, "peak_bytes": 1} if args.alone else {"peer": name})
    running.write_text("")
    args.output.write_text(json.dumps(rows[0] if args.alone else {"peers": rows}))
    if args.case[0] == "fails at its exit":
        os._exit(3)


if __name__ == "__main__":
    main()
