"""Check an installed wheel: every op forward and backward, the report, the command line.

    python -W error smoke.py                # every op against the definition
    python smoke.py --another-torch         # only what an import says under another torch

Run it by the environment's Python, outside a source tree.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command} fails:\n{done.stdout}{done.stderr}"
    return done.stdout


def checked(what: str) -> None:
    print(f"ok: {what}")


def check_place() -> None:
    """Check that the packages come from the environment, and that the wheel names its torch."""
    import synface
    import torch

    import synface_kernels as sk

    places = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    for package in (sk, synface):
        path = Path(package.__file__).resolve()
        assert path.parents[1] in places, f"{package.__name__} is imported from {path}"
    minor = ".".join(torch.__version__.split(".")[:2])
    own = version("synface-kernels")
    assert own.endswith(f"+torch{minor}"), f"version {own}, torch {torch.__version__}"
    needed = [r for r in requires("synface-kernels") or [] if r.startswith("torch=")]
    assert needed == [f"torch=={minor}.*"], needed
    checked(f"synface-kernels {own} in {path.parents[1]}, torch {torch.__version__}")


def gradients(run: Callable[..., Any], impl: str, *inputs: Any) -> list[Any]:
    """Return the value and the gradients of an op by one implementation."""
    import torch

    leaves = [x.clone().requires_grad_() for x in inputs]
    value = run(*leaves, impl=impl)
    value.backward(torch.ones_like(value))
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def check_ops() -> None:
    """Compare each op's CPU kernel with its definition, gradients included."""
    import torch

    import synface_kernels as sk

    torch.manual_seed(0)
    x, w = (torch.randn(n, 16, dtype=torch.float64) for n in (8, 12))
    target, psi = torch.randint(12, (8,)), torch.rand(4, dtype=torch.float64)
    faces = torch.rand(2, 4, 6, 5, 3, dtype=torch.float64)

    def margin(x: Any, w: Any, impl: str) -> Any:
        return sk.margin_cross_entropy(x, w, target, margin=sk.ArcFace(), impl=impl)

    differentiable = [
        (margin, (x, w)),
        (sk.domain_mixup, (faces[0], faces[1], psi)),
        (sk.hypersphere_repulsion, (x, w)),
    ]
    for function, inputs in differentiable:
        found = [gradients(function, impl, *inputs) for impl in ("cpu", "reference")]
        torch.testing.assert_close(*found)

    rows, class_ids = torch.randn(3, 16, dtype=torch.float64), torch.tensor([1, 4, 9])

    def update(impl: str) -> list[Any]:
        weight, first, second = w.clone(), torch.zeros_like(w), torch.zeros_like(w)
        sk.row_sgd_(weight, rows, class_ids, lr=0.1, impl=impl)
        sk.row_adamw_(weight, rows, class_ids, first, second, 1, impl=impl)
        return [weight, first, second]

    def draw(impl: str) -> Any:
        generator = torch.Generator().manual_seed(0)
        return sk.sample_classes(target, 100, 20, generator, impl=impl)

    torch.testing.assert_close(update("cpu"), update("reference"))
    torch.testing.assert_close(draw("cpu"), draw("reference"))
    torch.testing.assert_close(*(sk.nearest_neighbors(x, w, impl=i) for i in ("cpu", "reference")))
    checked("every op's CPU kernel, forward and backward, against its definition")


def check_numpy() -> None:
    """Check that the NumPy binding runs in a process that never imports torch."""
    code = (
        "import sys, numpy as np, synface_kernels.numpy as k; x = np.ones((2, 5, 4, 3), np.uint8);"
        "k.domain_mixup(x, x, 0.5); assert 'torch' not in sys.modules"
    )
    run("-W", "error", "-c", code)
    checked("the NumPy binding, without torch")


def check_commands() -> None:
    """Check the report, and the command line where its dependencies are installed."""
    from synface_kernels import _select

    report = run("-W", "error", "-m", "synface_kernels")
    for op in _select.ops():
        assert f"{op} on cpu, float32: cpu" in report, report
    checked("python -m synface_kernels shows CPU kernels of every op")
    if importlib.util.find_spec("typer") is None:
        print("not checked: synface --help, which needs the extra [train]")
    else:
        help_text = run("-W", "error", "-m", "synface", "--help")
        assert "train" in help_text, help_text
        checked("synface --help")


def check_sources() -> None:
    """Check that the wheel carries what CUDA kernels are compiled from at first use."""
    from synface_kernels import _cuda

    root = _cuda.sources()
    package = Path(_cuda.__file__).parent
    assert root == package / "csrc", f"sources in {root}"
    for name in _cuda.parts("domain_mixup"):
        assert (root / name).exists(), f"{name} is not in the wheel"
    checked("sources of the CUDA kernels")


def check_another_torch() -> None:
    """Check that an import under another torch says so, loads nothing, and that ops still run."""
    import torch

    own = ".".join(torch.__version__.split(".")[:2])
    torch.__version__ = "99.1.0"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import synface_kernels as sk
    (said,) = (str(w.message) for w in caught if "synface_kernels" in str(w.message))
    assert f"compiled for torch {own}, and torch 99.1.0 is installed" in said, said
    assert "install the wheel whose version ends in +torch99.1, or torch " + own in said, said
    maps = Path("/proc/self/maps")
    assert not maps.exists() or "synface_kernels/_C" not in maps.read_text()
    sk.margin_cross_entropy(torch.ones(2, 4), torch.eye(4), torch.tensor([0, 1]))
    checked("under another torch an import warns: " + said)


if __name__ == "__main__":
    if sys.argv[1:] == ["--another-torch"]:
        check_another_torch()
    else:
        check_place()
        check_ops()
        check_numpy()
        check_commands()
        check_sources()
