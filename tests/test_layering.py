"""The rules of the layout: which package may import which, an op's files, the size of files."""

import ast
import inspect
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

import synface_kernels as sk
from synface_kernels import _env, _select

ROOT = Path(__file__).parents[1]
OPS = sorted(p.name for p in (ROOT / "synface_kernels" / "ops").iterdir() if (p / "op.py").exists())


TRAINING = ROOT / "python" / "synface"
# What each package of the training layer may import of it, besides `common`.
MAY_IMPORT = {
    "common": set(),
    "models": set(),
    "reporting": set(),
    "checkpoint": set(),
    "data": set(),
    "alignment": {"data"},
    "optim": set(),
    "heads": {"optim"},
    "evaluation": {"data", "reporting"},
    "training": {"checkpoint", "data", "heads", "models", "optim"},
    "inference": {"checkpoint", "data", "evaluation", "training"},
    "synthesis": {"checkpoint", "data", "reporting", "training"},
    "bench": {"data", "evaluation", "models", "optim", "reporting", "synthesis", "training"},
    "recipes": {
        "checkpoint", "data", "evaluation", "heads", "models", "optim", "reporting", "synthesis",
        "training",
    },
}  # fmt: skip
MAY_IMPORT["cli"] = set(MAY_IMPORT)


@cache
def parsed(path: Path) -> ast.Module:
    """Return a file's syntax tree, which no test changes."""
    return ast.parse(path.read_text())


def imports(path: Path):
    """Yield the absolute names that a file imports, wherever in it, relative ones resolved."""
    package = path.parent.relative_to(ROOT)
    here = [part for part in package.parts if part != "python"]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


@cache
def pairs():
    """Return (importing, imported) for packages of the training layer, without repetition."""
    found = set()
    for path in TRAINING.rglob("*.py"):
        own = path.relative_to(TRAINING).parts[0]
        for name in imports(path):
            package, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if package == "synface" and other in MAY_IMPORT and other != own:
                found.add((own, other))
    return sorted(found)


def test_every_package_of_the_training_layer_has_a_rule():
    modules = {path.name for path in TRAINING.iterdir() if path.name != "__pycache__"}
    assert modules == {*MAY_IMPORT, "__init__.py", "__main__.py", "py.typed"}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_what_its_rule_says(package):
    imported = {other for own, other in pairs() if own == package}
    assert imported - {"common"} <= MAY_IMPORT[package] - {package}
    if package == "common":
        assert not imported


def test_packages_do_not_import_each_other_in_circles():
    """A package may import only packages that precede it in MAY_IMPORT."""
    order = list(MAY_IMPORT)
    for own, others in MAY_IMPORT.items():
        assert all(order.index(other) < order.index(own) for other in others - {own}), own


def test_there_are_few_arrows_between_packages():
    assert len(pairs()) <= 59


@pytest.mark.slow
def test_the_kernels_do_not_know_the_training_layer():
    for package in ("synface_kernels", "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            assert not [m for m in imports(path) if m.split(".")[0] == "synface"], path


def test_the_training_layer_uses_public_names_alone():
    for path in (ROOT / "python" / "synface").rglob("*.py"):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "synface_kernels"
            ):
                private = [
                    a.name for a in node.names if a.name.startswith("_") and a.name != "_env"
                ]
                assert not private, (path, private)


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_all_its_parts(op):
    assert functions(op)
    parts = [
        f"synface_kernels/ops/{op}/op.py",
        f"synface_kernels/ops/{op}/reference.py",
        f"tests/ops/test_{op}.py",
        f"benchmarks/bench_{op}.py",
    ]
    for impl in _select._REGISTRY[op]:
        parts += {
            "cpu": [f"csrc/{op}/cpu.cpp", f"csrc/{op}/cpu-inl.h"],
            "cuda": [f"csrc/{op}/cuda.cu"],
            "triton": [
                f"synface_kernels/ops/{op}/kernel_triton.py",
                f"tests/triton/aot_{op}.py",
                f"tests/triton/interpreted/test_{op}.py",
            ],
            "reference": [],
        }.get(impl, [f"synface_kernels/ops/{op}/kernel_{impl}.py"])
    assert [p for p in parts if not (ROOT / p).exists()] == []
    assert {"cpu", "reference"} <= set(_select._REGISTRY[op])
    assert {"triton", "torch"} & set(_select._REGISTRY[op])  # for a GPU


def functions(op):
    """Return the public functions that are defined in the op's folder."""
    public = [getattr(sk, name) for name in sk.__all__]
    module = f"synface_kernels.ops.{op}.op"
    return [f for f in public if inspect.isfunction(f) and f.__module__ == module]


@pytest.mark.parametrize("op", OPS)
def test_an_op_says_what_it_needs_to(op):
    for function in functions(op):
        doc = inspect.getdoc(function) or ""
        for section in ("Args:", "Returns:", "Raises:", "Memory", "Source:"):
            assert section in doc, (function, section)


@pytest.mark.parametrize("name", sorted({*sk.__all__} - {"MarginStats", "empty_cache", "explain"}))
def test_what_computes_names_its_source(name):
    assert "Source:" in (inspect.getdoc(getattr(sk, name)) or "")


def test_no_file_of_code_is_long():
    """No file exceeds 600 lines; a longer one has a seam along which to cut it."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0")]
    code = [p for p in paths if p.suffix in (".py", ".cpp", ".h", ".cu") and p.exists()]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in code}
    assert not {name: length for name, length in lengths.items() if length > 600}


FLOATING = {"empty", "eye", "full", "linspace", "ones", "rand", "randn", "zeros"}
MAKERS = FLOATING | {
    "arange", "as_tensor", "asarray", "randint", "randperm", "scalar_tensor", "sparse_coo_tensor",
    "tensor", "tril_indices", "triu_indices",
}  # fmt: skip


def dotted(node):
    """Return "module.name" for an expression of that form, otherwise an empty string."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return f"{node.value.id}.{node.attr}"
    return ""


def left_to_defaults(tree):
    """Yield the lines of calls such as torch.zeros that leave device or dtype to defaults.

    Those within nn.Parameter(…) may: a module's parameters are made where its user has them made.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name == "nn.Parameter":
                continue
            kind = name.removeprefix("torch.")
            needed = {"device", "dtype"} if kind in FLOATING else {"device"}
            given = {keyword.arg for keyword in node.keywords}
            if name.startswith("torch.") and kind in MAKERS and not needed <= given:
                yield node.lineno
        yield from left_to_defaults(node)


@pytest.mark.slow
def test_nothing_is_made_where_torchs_defaults_say():
    for package in ("python/synface", "synface_kernels"):
        for path in (ROOT / package).rglob("*.py"):
            assert not list(left_to_defaults(parsed(path))), path


def includes(path: Path) -> list[str]:
    """Return the first folder of each header that a C++ source includes."""
    return re.findall(r'^\s*#\s*include\s*[<"]([^/>"]+)', path.read_text(), re.MULTILINE)


def test_torch_headers_are_included_by_bindings_alone():
    """Only `csrc/<op>/torch.cpp` and `csrc/torch/` include ATen or torch."""
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".cpp", ".h", ".cu"):
            bindings = path.name == "torch.cpp" or path.parent.name == "torch"
            uses_torch = {"ATen", "c10", "torch"} & set(includes(path))
            assert bindings or not uses_torch, path
            assert path.parent.name == "numpy" or "pybind11" not in includes(path), path


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_bindings_for_torch(op):
    text = (ROOT / "csrc" / op / "torch.cpp").read_text()
    assert f'library.impl("{op}' in text


def test_every_environment_variable_is_in_the_table():
    for pattern in ("csrc/**/*", "synface_kernels/**/*.py", "setup.py"):
        for path in ROOT.glob(pattern):
            if path.suffix in (".cpp", ".h", ".py"):
                for word in path.read_text().replace('"', " ").replace("=", " ").split():
                    if word.startswith(("SYNFACE_CPU_", "SYNFACE_CUDA", "SYNFACE_TRITON")):
                        assert word.strip("`.,:;)(") in _env.VARIABLES, (path, word)


def test_report(capsys):
    text = _env.report()
    for op in OPS:
        assert f"{op} on cpu, float32: cpu" in text
    for name in _env.VARIABLES:
        assert name in text
