"""An extension that is missing or does not load is named once, and the results stay right."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import synface_kernels

PACKAGE = Path(synface_kernels.__file__).parent

USE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, synface_kernels as sk
    torch.manual_seed(0)
    input, weight = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8)
    for _ in range(2):
        loss = sk.margin_cross_entropy(input, weight, torch.tensor([0, 3, 5, 1]))
    loss.backward()
    sk.nearest_neighbors(input.detach())
    images = torch.randint(256, (2, 5, 4, 3), dtype=torch.uint8)
    sk.domain_mixup(images, images, 0.5)
    sk.row_sgd_(weight, torch.ones(1, 8), torch.tensor([1]), lr=0.1)
    sk.sample_classes(torch.tensor([0, 3]), 6, 4)
ours = [str(w.message) for w in caught if "synface_kernels" in str(w.message)]
print(len(ours), loss.item(), *ours)
import runpy
runpy.run_module("synface_kernels", run_name="__main__")
"""


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def here() -> list[str]:
    """Return the warnings' number and the loss of an unchanged package."""
    return run(["-c", USE], PACKAGE.parent).split()[:2]


@pytest.mark.parametrize(
    ("extension", "cause"),
    [
        (None, "is not built"),
        ("_C.cpython-399-x86_64-linux-gnu.so", "built for another Python than"),
        ("_C.so", "file too short"),
        ("_C.so", "is compiled for torch 1.13, and torch "),
    ],
)
@pytest.mark.slow
def test_an_extension_that_does_not_load_is_named_once(
    tmp_path: Path, here: list[str], extension: str | None, cause: str
) -> None:
    copy = tmp_path / PACKAGE.name
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if extension is not None:
        compiled_for = b"synface_kernels is compiled for torch 1.13\0"
        (copy / extension).write_bytes(compiled_for if "1.13" in cause else b"another torch's")
    line, report = run(["-c", USE], tmp_path).split("\n", 1)
    count, loss, warning = line.split(" ", 2)
    assert count == "1"
    assert cause in warning
    assert "pip install" in warning
    assert here[0] == "0"
    assert abs(float(loss) - float(here[1])) < 1e-4
    assert "CPU kernels: none" in report
    assert cause in report
