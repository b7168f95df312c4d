"""CUDA kernels that a build lacks are compiled at first use: the commands, the cache, the errors.

No GPU is needed, and no compiler: stand-ins record how they are called.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

import synface_kernels as sk
from synface_kernels import _cuda, _cuda_toolkit, _select
from tools import cuda_check

OP = "domain_mixup"
GPU = torch.device("cuda")
LOADED = torch._C._dispatch_has_kernel_for_dispatch_key(f"synface_kernels::{OP}_cuda", "CUDA")
pytestmark = pytest.mark.skipif(LOADED, reason="this build has CUDA kernels")

# Answers what is asked about the version, records other calls and makes the file that is asked for.
STAND_IN = """#!/bin/sh
case "$1" in --version) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit ;;
    -v|-dumpfullversion) exec c++ "$@" ;; esac
echo "$0 $*" >> {log}
while [ $# -gt 1 ]; do [ "$1" = -o ] && touch "$2"; shift; done
"""


def stand_in(path: Path, log: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(STAND_IN.format(log=log))
    path.chmod(0o755)


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Write a CUDA toolkit whose compilers are stand-ins, and let torch be of its version."""
    home = tmp_path / "toolkit"
    stand_in(home / "bin" / "nvcc", tmp_path / "log")
    stand_in(tmp_path / "c++", tmp_path / "log")
    for name in ("include/cuda_runtime.h", "lib/libcudart.so.13"):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).touch()
    settings = {"CUDA_HOME": home, "CXX": tmp_path / "c++", "TORCH_CUDA_ARCH_LIST": "9.0",
                "TORCH_EXTENSIONS_DIR": tmp_path / "cache"}  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("SYNFACE_CUDA", raising=False)
    monkeypatch.setattr(_cuda_toolkit, "torch_cuda", "13.0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    _cuda.compile_at_first_use.cache_clear()
    yield home
    _cuda.compile_at_first_use.cache_clear()


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of libraries that are loaded from now on, none of them really."""
    paths: list[str] = []
    monkeypatch.setattr(torch.ops, "load_library", paths.append)
    monkeypatch.setattr(cpp_extension, "_import_module_from_library", lambda *_: None)
    return paths


def test_auto_goes_on_with_triton_and_says_how_to_get_cuda_kernels() -> None:
    choice = sk.explain(OP, device="cuda")
    assert choice.impl != "cuda"
    assert "compiles them at first use" in choice.rejected["cuda"]


def test_an_explicit_choice_compiles_once(
    toolkit: Path, tmp_path: Path, loaded: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    prepare = _select._PREPARATIONS[OP, "cuda"]
    assert prepare(torch.device("cpu")) is None
    assert not loaded
    assert prepare(GPU) is None
    said = capfd.readouterr().err
    assert f"compiles the CUDA kernels of {OP} for 9.0 by {toolkit}/bin/nvcc" in said
    commands = [shlex.split(line) for line in (tmp_path / "log").read_text().splitlines()]
    (device,) = (c for c in commands if c[0].endswith("nvcc"))
    (library,) = (c for c in commands if "-shared" in c)
    hosts = [c for c in commands if c[0].endswith("c++") and "-c" in c]
    root = _cuda.sources()
    assert device[device.index("-c") + 1] == str(root / OP / "cuda.cu")
    assert {c[c.index("-c") + 1] for c in hosts} == {
        str(root / part) for part in _cuda.parts(OP) if part.endswith(".cpp")
    }
    assert "-gencode=arch=compute_90,code=sm_90" in device
    assert set(_cuda_toolkit.NVCC_FLAGS) <= set(device)
    assert all({"-DSYNFACE_CUDA", "-DSYNFACE_NO_CPU", "-std=c++20"} <= set(c) for c in hosts)
    assert all(f"-I{root}" in " ".join(c).replace("-isystem ", "-I") for c in [device, *hosts])
    assert Path(loaded[0]).name == library[library.index("-o") + 1]
    # Linkers look for a name without a version.
    assert (Path(loaded[0]).parent / "libcudart.so").resolve() == toolkit / "lib/libcudart.so.13"

    _cuda.compile_at_first_use.cache_clear()  # as in another process
    assert prepare(GPU) is None
    assert loaded[1] == loaded[0]
    assert len((tmp_path / "log").read_text().splitlines()) == len(commands)
    assert not capfd.readouterr().err


def test_the_variable_lets_auto_compile(
    toolkit: Path, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNFACE_CUDA", "1")
    assert sk.explain(OP, device="cuda").impl == "cuda"
    assert len(loaded) == 1


def test_the_cache_tells_torch_gpu_and_source_apart(
    toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {_cuda.library_name(OP, "home", listed) for listed in ("8.0", "9.0")}
    names.add(_cuda.library_name(OP, "another home", "9.0"))
    with monkeypatch.context() as changed:
        changed.setattr(torch, "__version__", "99.0")
        names.add(_cuda.library_name(OP, "home", "9.0"))
    tree = tmp_path / "csrc"
    for folder in ("common", OP, "simd", "torch"):
        (tree / folder).mkdir(parents=True)
    (tree / OP / "cuda.cu").write_text("// another")
    monkeypatch.setattr(_cuda, "sources", lambda: tree)
    names.add(_cuda.library_name(OP, "home", "9.0"))
    assert len(names) == 5


def test_a_machine_without_a_gpu_names_what_is_missing(
    toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("SYNFACE_CUDA", "1")
    choice = sk.explain(OP, device="cuda")
    assert choice.impl != "cuda"
    assert "no GPU is visible" in choice.rejected["cuda"]


def test_an_architecture_that_torch_does_not_know_is_a_reason(
    toolkit: Path, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "sm_90")
    monkeypatch.setenv("SYNFACE_CUDA", "1")
    choice = sk.explain(OP, device="cuda")
    assert choice.impl != "cuda"
    assert "sm_90" in choice.rejected["cuda"]
    assert not loaded


def test_the_check_of_cuda_sources_compiles_as_builds_do() -> None:
    assert cuda_check.FLAGS == _cuda_toolkit.NVCC_FLAGS
    assert cuda_check.ARCHITECTURES == _cuda_toolkit.ARCHITECTURES


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("bin/nvcc", "cannot be compiled here: no CUDA 13.0 toolkit: .*toolkit has no bin/nvcc"),
        (None, "cannot be compiled here: .*Error building extension"),
    ],
)
def test_why_it_fails_is_said(
    toolkit: Path, broken: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if broken is None:
        (toolkit / "bin/nvcc").write_text(
            '#!/bin/sh\n[ "$1" = --version ] && echo "release 13.0," || exit 1\n'
        )
    else:
        (toolkit / broken).unlink()
        monkeypatch.setattr(_cuda_toolkit, "toolkits", lambda: [str(toolkit)])
    problem = _select._PREPARATIONS[OP, "cuda"](GPU)
    assert problem is not None
    assert re.search(message, problem, re.DOTALL)
