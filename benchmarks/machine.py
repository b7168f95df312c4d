"""A description of the machine that is measured on, and a check that it is idle."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from typing import Any

import torch

from synface_kernels import _env

from .process import ROOT, slug

# Where other programs keep more cores busy than this, results are marked as from a busy machine.
BUSY_CORES_MAX = 0.15
describe = _env.describe


def file_stem(described: Mapping[str, Any]) -> str:
    """Return the name, without suffix, of the result files of a machine's processor."""
    return slug(f"{described['processor']} {described['cores']} cores")


def commit() -> str:
    """Return the commit of the checkout, marked where files differ; "unknown" without git.

    Results do not count as such files, because measuring writes them.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    sources = ["--", ".", ":(exclude)benchmarks/results"]
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", *sources)
        return git("describe", "--always", "--exclude=*") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def available_memory(device: torch.device) -> int:
    """Return how many bytes can be allocated now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as info:
        for line in info:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no line MemAvailable")


def busy_cores(seconds: float = 1.0) -> float:
    """Measure how many cores other programs keep busy while this one sleeps."""

    def ticks() -> int:
        with open("/proc/stat") as stat:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(
                int, stat.readline().split()[1:9]
            )
        return user + nice + system + irq + softirq + steal

    before, start = ticks(), time.perf_counter()
    time.sleep(seconds)
    return (ticks() - before) / os.sysconf("SC_CLK_TCK") / (time.perf_counter() - start)


def idle_check(seconds: float = 1.0) -> dict[str, Any]:
    """Measure whether the machine is idle; the load average is only reported, because it lags."""
    busy = busy_cores(seconds)
    return {
        "busy_cores": round(busy, 2),
        "load_average": round(os.getloadavg()[0], 2),
        "idle": busy <= BUSY_CORES_MAX,
    }
