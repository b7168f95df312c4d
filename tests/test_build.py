"""A wheel built from the source distribution works; builds without a GPU name architectures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SMOKE = """
import importlib.util, synface, synface_kernels as sk, torch
assert importlib.util.find_spec("synface_kernels._numpy") is not None
import synface_kernels.numpy as kernels
input = torch.randn(4, 8, dtype=torch.float64)
weight = torch.randn(6, 8, dtype=torch.float64)
target = torch.tensor([0, 3, 5, 1])
losses = [sk.margin_cross_entropy(input, weight, target, impl=i) for i in ("cpu", "reference")]
torch.testing.assert_close(*losses)
images = torch.randint(256, (2, 5, 4, 3), dtype=torch.uint8)
mixed = sk.domain_mixup(images, images, 0.5, impl="cpu")
assert (kernels.domain_mixup(images.numpy(), images.numpy(), 0.5) == mixed.numpy()).all()
import synface.cli
print(sk.__file__)
"""


def run(command: list[str], folder: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)  # it compiles everything
def test_a_wheel_from_the_source_distribution_works(tmp_path: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    tree = tmp_path / "tree"
    built = ("*.so", "*.egg-info", "build", "dist", "__pycache__", ".*cache", "runs")
    unpacked = shutil.ignore_patterns(".git", ".venv*", ".hypothesis", *built)
    shutil.copytree(ROOT, tree, ignore=unpacked)
    build = "from setuptools.build_meta import build_sdist; build_sdist(r'{}')"
    run([sys.executable, "-c", build.format(tmp_path)], tree)
    (archive,) = tmp_path.glob("*.tar.gz")
    quick = tmp_path / "c++"  # the last -O wins; the test is whether all sources are there
    quick.write_text(f'#!/bin/sh\nexec {compiler} "$@" -O0\n')
    quick.chmod(0o755)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    run([*wheel, "-w", str(tmp_path), str(archive)], tmp_path, CXX=str(quick), SYNFACE_CUDA="0")
    (file,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(file) as content:
        content.extractall(installed)
    for pattern in ("recipes/*/*.toml", "recipes/*/*.md", "bench/*.md", "evaluation/*.md"):
        beside = sorted(p.name for p in (ROOT / "python/synface").glob(pattern))
        assert beside
        assert sorted(p.name for p in (installed / "synface").glob(pattern)) == beside
    for package in ("synface", "synface_kernels"):
        assert (installed / package / "py.typed").exists()
    where = run([sys.executable, "-W", "error", "-c", SMOKE], tmp_path, PYTHONPATH=str(installed))
    assert Path(where.strip()).is_relative_to(installed)


# A CUDA build of torch that sees no GPU, and an nvcc, as when an image is built elsewhere.
WITHOUT_GPU = """
import json, runpy
import torch, torch.version
torch.version.cuda = "13.0"
torch.cuda._is_compiled = lambda: True
torch.cuda.is_available = lambda: False
torch.cuda.device_count = lambda: 0
import setuptools
setuptools.setup = lambda **options: None
runpy.run_path("setup.py")
from torch.utils.cpp_extension import _get_cuda_arch_flags
print(json.dumps(_get_cuda_arch_flags(["-O3"])))
"""


@pytest.mark.parametrize(
    ("given", "offered", "expected"),
    [
        ("", "compute_80 compute_90 compute_100", ["80", "90", "100", "100+PTX"]),
        ("native", "compute_75 compute_80 compute_86 compute_90", ["80", "90", "90+PTX"]),
        ("8.6", "compute_75 compute_80 compute_86 compute_90", ["86"]),
    ],
)
def test_a_build_without_a_gpu_names_the_architectures(
    tmp_path: Path, given: str, offered: str, expected: list[str]
) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\nprintf '%s\\n' {offered}\n")
    nvcc.chmod(0o755)
    arguments = [sys.executable, "-c", WITHOUT_GPU]
    printed = run(
        arguments, ROOT, CUDA_HOME=str(tmp_path), TORCH_CUDA_ARCH_LIST=given, SYNFACE_CUDA="1"
    )
    flags = {
        f"-gencode=arch=compute_{name.split('+')[0]},code="
        + (f"compute_{name[:-4]}" if name.endswith("+PTX") else f"sm_{name}")
        for name in expected
    }
    assert set(json.loads(printed.splitlines()[-1])) == flags
