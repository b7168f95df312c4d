"""A wheel from the source distribution works where it is installed; builds name architectures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

import synface_kernels
from tools import build_wheel

ROOT = Path(__file__).parents[1]
PACKAGE = Path(synface_kernels.__file__).parent


# Compiles nothing, which takes minutes, and links what this environment has compiled of the same
# sources. Keeps the commands.
COMPILER = """#!/bin/sh
echo "$@" >> "{log}"
for word; do
    case "$word" in
        -c) compiles=1 ;;
        -shared) shared=1 ;;
        *.o) object="$word" ;;
        *.so) library="$word" ;;
    esac
done
if test -n "$compiles"; then touch "$object"
elif test -n "$shared"; then cp "{package}/$(basename "$library")" "$library"
else exec {compiler} "$@"
fi
"""


@pytest.mark.slow
def test_a_wheel_from_the_source_distribution_works(tmp_path: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    tree = tmp_path / "tree"
    built = ("*.so", "*.egg-info", "build", "dist", "__pycache__", ".*cache", "runs")
    unpacked = shutil.ignore_patterns(".git", ".venv*", ".hypothesis", *built)
    shutil.copytree(ROOT, tree, ignore=unpacked)
    quick = tmp_path / "c++"
    log = tmp_path / "commands"
    quick.write_text(COMPILER.format(compiler=compiler, package=PACKAGE, log=log))
    quick.chmod(0o755)
    wheel = build_wheel.build(tree, tmp_path, CXX=str(quick))
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        packed = {name.partition("/")[2] for name in content.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert sources <= packed
    commands = log.read_text().splitlines()
    linked = [command for command in commands if "-shared" in command.split()]
    assert len(linked) == 2
    for source in sorted((ROOT / "csrc").rglob("*.cpp")):  # each is compiled, and linked
        name = str(source.relative_to(ROOT).with_suffix(""))
        assert any(f"{name}.cpp" in command for command in commands if " -c " in command), name
        assert any(f"{name}.o" in command for command in linked), name

    environment = tmp_path / "environment"
    python = build_wheel.environment(environment, "--without-pip")
    (installed,) = environment.glob("lib/python*/site-packages")
    # torch and the other dependencies are those of this environment, not drawn again.
    dependencies = Path(torch.__file__).parents[1]
    (installed / "dependencies.pth").write_text(str(dependencies))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    build_wheel.run(*pip, "install", "--quiet", "--no-index", "--no-compile", wheel)
    build_wheel.check(python, tmp_path)
    for pattern in ("recipes/*/*.toml", "recipes/*/*.md", "bench/*.md", "evaluation/*.md"):
        beside = sorted(p.name for p in (ROOT / "python/synface").glob(pattern))
        assert beside
        assert sorted(p.name for p in (installed / "synface").glob(pattern)) == beside
    for package in ("synface", "synface_kernels"):
        assert (installed / package / "py.typed").exists()


# Runs setup.py up to its build under each of the environments in the argument, with a CUDA build
# of torch that sees no GPU, and toolkits in the folder alone that ROOT names.
SETUP = """
import contextlib, glob, io, json, os, runpy, sys
import torch, torch.version
torch.version.cuda = "13.0"
torch.cuda._is_compiled = lambda: True
torch.cuda.is_available = lambda: False
torch.cuda.device_count = lambda: 0
import setuptools
setuptools.setup = lambda **options: None
from torch.utils import cpp_extension
usual, plain = glob.glob, dict(os.environ)
def redirected(pattern):
    outside = pattern.startswith(("/usr/local", "/opt"))
    return usual(os.environ["ROOT"] + pattern if outside else pattern)
glob.glob = redirected
results = []
for environment in json.loads(sys.argv[1]):
    os.environ.clear()
    os.environ.update(plain | environment)
    printed, found = io.StringIO(), {"home": None, "flags": [], "error": None}
    with contextlib.redirect_stdout(printed):
        try:
            made = runpy.run_path("setup.py")
            if made["WITH_CUDA"]:
                found["home"] = cpp_extension.CUDA_HOME
                found["flags"] = cpp_extension._get_cuda_arch_flags(["-O3"])
            BUILD
        except (SystemExit, RuntimeError) as error:
            found["error"] = str(error)
    results.append(found | {"printed": printed.getvalue()})
print(json.dumps(results))
"""


def machine(root: Path) -> dict[str, str]:
    """Return the variables of a machine whose toolkits are in a folder."""
    return {"ROOT": str(root), "PATH": f"{root}/path/bin:/usr/bin:/bin"}


def set_up(*environments: dict[str, str], build: str = "pass") -> list[dict[str, Any]]:
    """Return what setup.py finds and prints under each environment, and how it ends."""
    left_out = ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "SYNFACE_CUDA")
    plain = {name: value for name, value in os.environ.items() if name not in left_out}
    done = subprocess.run(
        [sys.executable, "-c", SETUP.replace("BUILD", build), json.dumps(environments)],
        cwd=ROOT,
        env=plain,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def toolkit(folder: Path, offered: str = "compute_90", release: str = "13.0") -> Path:
    """Write a CUDA toolkit whose nvcc answers two questions."""
    (folder / "bin").mkdir(parents=True)
    (folder / "include").mkdir()
    (folder / "include" / "cuda_runtime.h").write_text("")
    nvcc = folder / "bin" / "nvcc"
    listed = f"printf '%s\\n' {offered}" if offered else "exit 1"
    nvcc.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then echo "Cuda release {release}, V{release}.1"\n'
        f"else {listed}\nfi\n"
    )
    nvcc.chmod(0o755)
    return folder


def wrapper(folder: Path) -> Path:
    """Write an nvcc in a folder that is no toolkit, as a script that calls another."""
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    return folder


@pytest.mark.slow
def test_a_build_without_a_gpu_names_the_architectures(tmp_path: Path) -> None:
    cases = [
        ("", "compute_80 compute_90 compute_100", ["80", "90", "100", "100+PTX"]),
        ("native", "compute_75 compute_80 compute_86 compute_90", ["80", "90", "90+PTX"]),
        ("8.6", "compute_75 compute_80 compute_86 compute_90", ["86"]),
    ]
    homes = [toolkit(tmp_path / str(i), offered) for i, (_, offered, _) in enumerate(cases)]
    environments = [
        machine(tmp_path)
        | {"CUDA_HOME": str(home), "TORCH_CUDA_ARCH_LIST": given, "SYNFACE_CUDA": "1"}
        for home, (given, _, _) in zip(homes, cases, strict=True)
    ]
    results = set_up(*environments)
    for home, (_, _, expected), found in zip(homes, cases, results, strict=True):
        assert found["error"] is None
        assert found["home"] == str(home)
        assert set(found["flags"]) == {
            f"-gencode=arch=compute_{name.split('+')[0]},code="
            + (f"compute_{name[:-4]}" if name.endswith("+PTX") else f"sm_{name}")
            for name in expected
        }


@pytest.mark.slow
def test_an_nvcc_that_is_only_a_script_is_passed_over(tmp_path: Path) -> None:
    """The toolkit has headers and torch's version; one without a version in its name is first."""
    wrapper(tmp_path / "path")
    older = toolkit(tmp_path / "usr/local/cuda-12.4", release="12.4")
    first, newest = (toolkit(tmp_path / f"usr/local/cuda-13.{n}") for n in (0, 2))
    another = tmp_path / "another"
    shutil.copytree(tmp_path, another)
    named = another / "usr/local/cuda"
    named.symlink_to(another / "usr/local/cuda-13.0")
    unnamed = machine(tmp_path)
    results = set_up(
        unnamed,
        unnamed | {"CUDA_HOME": str(older), "SYNFACE_CUDA": "1"},
        unnamed | {"CUDA_PATH": str(first)},
        unnamed | {"TORCH_CUDA_ARCH_LIST": "9.0"},
        machine(another),
    )
    found = [each["home"] for each in results]
    assert found == [*map(str, (newest, newest, first, newest, named))]


# Machines without a toolkit for torch: its release, the architectures it offers, what is said.
WITHOUT: list[tuple[str | None, str, str]] = [
    ("12.4", "compute_90", "has CUDA 12.4, torch is of 13.0"),
    ("13.0", "compute_52", "none of the architectures (80, 90, 100)"),
    ("13.0", "", "--list-gpu-arch fails"),
    (None, "", "path has no include/cuda_runtime.h"),
]


@pytest.mark.slow
def test_without_a_toolkit_the_build_is_without_cuda(tmp_path: Path) -> None:
    environments: list[dict[str, str]] = []
    for number, (release, offered, _) in enumerate(WITHOUT):
        root = tmp_path / str(number)
        wrapper(root / "path")
        if release is not None:
            toolkit(root / "usr/local/cuda", offered, release)
        asked: list[dict[str, str]] = [{}, {"SYNFACE_CUDA": "1"}, {"SYNFACE_CUDA": "0"}]
        environments += [machine(root) | each for each in asked]
    results = iter(set_up(*environments))
    for _, _, message in WITHOUT:
        automatic, forced, without = next(results), next(results), next(results)
        assert automatic["error"] is automatic["home"] is None
        assert automatic["printed"].startswith("building as with SYNFACE_CUDA=0, without CUDA: ")
        assert message in automatic["printed"]
        assert forced["error"].startswith("SYNFACE_CUDA=1: ")
        assert message in forced["error"]
        assert without == {"home": None, "flags": [], "error": None, "printed": ""}


# BuildExtension compiles no CUDA sources.
FAILING = """
            def build(self):
                cuda = sum(source.endswith(".cu") for source in self.extensions[0].sources)
                print("sources", cuda)
                if cuda:
                    raise RuntimeError("Error compiling objects")
            cpp_extension.BuildExtension.build_extensions = build
            extension = made["torch_extension"](True)
            command = made["Build"](setuptools.Distribution({"ext_modules": [extension]}))
            extension._full_name = "set by setuptools"
            command.extensions = [extension]
            command.build_extensions()
            assert extension._full_name == "set by setuptools"
            assert not extension.define_macros
            assert not any("cuda" in library for library in extension.libraries)
"""


@pytest.mark.slow
def test_cuda_sources_that_do_not_compile_are_left_out(tmp_path: Path) -> None:
    toolkit(tmp_path / "usr/local/cuda")
    here = machine(tmp_path)
    automatic, forced = set_up(here, here | {"SYNFACE_CUDA": "1"}, build=FAILING.strip())
    assert automatic["error"] is None
    assert "sources 1\nWARNING: with CUDA the build fails (Error compi" in automatic["printed"]
    assert automatic["printed"].endswith("sources 0\n")
    assert forced["error"] == "Error compiling objects"
