"""Builds of the extensions before a measurement, with the installed Python, torch and compiler."""

from __future__ import annotations

import sys
import sysconfig
import time
from typing import Any

from .process import ROOT, run_limited


def build(seconds: float, *, if_old: bool = False) -> dict[str, Any]:
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
