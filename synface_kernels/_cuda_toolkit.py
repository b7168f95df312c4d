"""The search for a CUDA toolkit that fits torch.

setup.py runs this file by itself, so it imports nothing of the package.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from glob import glob

from torch.version import cuda as torch_cuda

# Ampere, Hopper, Blackwell: the ones whose budgets tools/cuda_check.py checks.
ARCHITECTURES = (80, 90, 100)
NVCC_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr"]


class NoCuda(Exception):
    """The CUDA sources cannot be built, for the reason that the message gives."""


def toolkits() -> list[str]:
    """Return the folders that may be a CUDA toolkit's, the likelier ones first."""
    found = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        found += [os.path.dirname(os.path.dirname(path)) for path in (nvcc, os.path.realpath(nvcc))]
    for pattern in ("/usr/local/cuda*", "/opt/cuda*"):
        # The folder without a version first, which the machine's owner chose; then the newest.
        found += sorted(glob(pattern), key=version_in, reverse=True)
    found += sorted(glob(os.path.join(sysconfig.get_path("purelib"), "nvidia", "cu*")))
    return list(dict.fromkeys(filter(None, found)))


def version_in(path: str) -> tuple[bool, list[int]]:
    """Return a key that sorts folders of CUDA: the versions in their names, and above them none."""
    numbers = [int(number) for number in re.findall(r"\d+", os.path.basename(path))]
    return not numbers, numbers


def ask_nvcc(home: str, question: str) -> str:
    """Return what a toolkit's nvcc answers; raise NoCuda if it does not run."""
    nvcc = os.path.join(home, "bin", "nvcc")
    try:
        done = subprocess.run([nvcc, question], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoCuda(f"{nvcc} {question} fails: {error}") from error
    return done.stdout


def check_toolkit(home: str) -> None:
    """Raise NoCuda unless a folder has nvcc and headers of the CUDA that torch was built for.

    A script that calls nvcc may lie in a folder without headers.
    """
    for needed in ("bin/nvcc", "include/cuda_runtime.h"):
        if not os.path.exists(os.path.join(home, needed)):
            raise NoCuda(f"{home} has no {needed}")
    assert torch_cuda is not None
    version = re.search(r"release (\d+)\.(\d+)", ask_nvcc(home, "--version"))
    if version is not None and version[1] != torch_cuda.split(".")[0]:
        raise NoCuda(f"{home} has CUDA {version[1]}.{version[2]}, torch is of {torch_cuda}")


def find_toolkit() -> str:
    """Return the folder of a CUDA toolkit that fits torch; raise NoCuda if there is none."""
    if torch_cuda is None:
        raise NoCuda("this torch is built without CUDA")
    problems = []
    for home in toolkits():
        try:
            check_toolkit(home)
        except NoCuda as problem:
            problems.append(str(problem))
        else:
            return home
    raise NoCuda(f"no CUDA {torch_cuda} toolkit: {'; '.join(problems) or 'no nvcc was found'}")
