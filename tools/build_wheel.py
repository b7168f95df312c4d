"""Build a wheel of this tree for the installed torch, and check it in a clean environment.

    python tools/build_wheel.py OUT        # OUT/*.whl, OUT/environment

The environment is made anew and draws all that the wheel requires, torch too. tools/smoke.py runs
in it, outside this tree. Needs auditwheel and patchelf.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# torch's own libraries, which the running torch has loaded; a wheel must not carry copies.
EXCLUDED = ("libtorch*.so", "libc10*.so")


def run(*command: str | Path, folder: Path | None = None, **environment: str) -> None:
    # Settings that name a source tree would make the check one of that tree.
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(
        [str(part) for part in command], check=True, cwd=folder, env=inherited | environment
    )


def build(tree: Path, out: Path, **environment: str) -> Path:
    """Build a source distribution of the tree, and of that a CPU wheel that names its torch.

    So no file that an earlier build left in the tree gets into the wheel.
    """
    sdist = f"from setuptools.build_meta import build_sdist; build_sdist({str(out)!r})"
    run(sys.executable, "-c", sdist, folder=tree)
    (archive,) = out.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    plain = {"SYNFACE_WHEEL": "1", "SYNFACE_CUDA": "0"}
    run(*pip, "--no-cache-dir", "-w", out, archive, folder=out, **(plain | environment))
    (wheel,) = out.glob("*.whl")
    return wheel


def repair(wheel: Path, out: Path) -> Path:
    """Give a wheel the platform tag that its symbols allow; return the new one."""
    excluded = [word for name in EXCLUDED for word in ("--exclude", name)]
    run(sys.executable, "-m", "auditwheel", "repair", *excluded, "-w", out, wheel)
    (repaired,) = out.glob("*.whl")
    with zipfile.ZipFile(repaired) as content:
        carried = [name for name in content.namelist() if ".libs/" in name]
    assert not carried, f"the wheel carries libraries of this machine: {carried}"
    return repaired


def environment(folder: Path, *options: str) -> Path:
    """Make a virtual environment; return its Python."""
    run(sys.executable, "-m", "venv", "--clear", *options, folder)
    return folder / "bin" / "python"


def check(python: Path, folder: Path) -> None:
    """Run the smoke test outside the tree, and see what an import says under another torch."""
    smoke = shutil.copy(ROOT / "tools" / "smoke.py", folder)
    run(python, "-W", "error", smoke, folder=folder)
    run(python, smoke, "--another-torch", folder=folder)


def main() -> None:
    out = Path(sys.argv[1]).resolve()
    for part in ("built", "environment"):  # the folder may hold other files
        shutil.rmtree(out / part, ignore_errors=True)
    for old in out.glob("synface_kernels-*.whl"):
        old.unlink()
    (out / "built").mkdir(parents=True)
    wheel = repair(build(ROOT, out / "built"), out)
    python = environment(out / "environment")
    pip = (python, "-m", "pip", "install", "--quiet", "--no-compile")
    run(*pip, f"torch=={version('torch')}", f"{wheel}[train]")
    check(python, out)
    print(f"{wheel} works")


if __name__ == "__main__":
    main()
