"""The command line helps, suits any terminal and names what is missing before it does anything."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.helpers.training import TINY, folder

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (
    *("train", "eval", "embed", "compare", "export", "leak", "align", "convert", "pack"),
    *("synthesize", "plan", "study", "info", "demo"),
    *("recipe", "recipe cfsm", "recipe synface", "recipe gap", "recipe hyperface"),
    *("bench", "bench scale", "bench codes", "bench compare", "bench training"),
)


def python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        env=os.environ | {"COLUMNS": "100"} | environment,
        check=False,
    )


MAIN = """
import sys
from synface.cli import main
sys.argv[0] = "synface"
main()
"""
WITHOUT_TORCH = """
import sys
from synface.cli import main
for words in sys.argv[1:]:
    sys.argv = ["synface", *words.split()]
    try:
        main()
    except SystemExit as end:
        assert end.code in (0, None), words
    assert "torch" not in sys.modules, words
"""
IN_TURN = """
import sys
from synface.cli import main
words, codes = sys.argv[1:], []
while words:
    end = words.index("--then")
    sys.argv, words = ["synface", *words[:end]], words[end + 1:]
    try:
        main()
        codes.append(0)
    except SystemExit as ended:
        codes.append(ended.code or 0)
    assert "--help" not in sys.argv or "torch" not in sys.modules, sys.argv
print("exit codes", *codes)
"""  # starts once for several commands, each of which --then ends


def test_help_and_version_come_without_torch():
    calls = ["--version", "--help", "-h", *(f"{name} --help" for name in COMMANDS), "pack -h"]
    done = python(WITHOUT_TORCH, *calls)
    assert done.returncode == 0, done.stderr.decode()
    shown = done.stdout.decode()
    assert shown.splitlines()[0] == f"synface {version('synface-kernels')}"
    assert shown.count("Usage: synface pack") == 2
    assert "--no-flip" in shown
    assert "--sample-rate" in shown
    assert not re.search("bool", shown, re.IGNORECASE)


def test_as_a_module():
    call = [sys.executable, "-m", "synface", "--version"]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    assert done.stdout == f"synface {version('synface-kernels')}\n"


def test_the_help_names_every_command():
    from synface.cli import app
    from typer.main import get_command

    groups = {"": get_command(app)}
    found = set()
    while groups:
        prefix, group = groups.popitem()
        for name, command in group.commands.items():
            found.add(f"{prefix}{name}")
            if hasattr(command, "commands"):
                groups[f"{prefix}{name} "] = command
    assert found == set(COMMANDS)


# -- terminals


LOCALES = [
    {"PYTHONIOENCODING": "latin-1"},
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]


@pytest.mark.parametrize("locale", LOCALES, ids=lambda x: " ".join(map("=".join, x.items())))
@pytest.mark.slow
def test_no_terminal_is_too_narrow_for_help_and_errors(tmp_path, locale):
    folder = tmp_path / "visages-é-顔"
    folder.mkdir()
    helps = [word for name in COMMANDS for word in (*name.split(), "--help", "--then")]
    errors = ["convert", folder, tmp_path / "x", "--to", "folder", "--then"]
    errors += ["convert", "--é", "--then"]
    done = python(IN_TURN, "--help", "--then", *helps, *errors, **locale)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stdout + done.stderr
    codes = [0] * (1 + len(COMMANDS)) + [2, 2]
    assert done.stdout.splitlines()[-1].decode() == " ".join(map(str, ["exit codes", *codes]))
    assert b"\\u2026" in done.stdout  # the ellipsis in an option of train's
    assert b"visages-" in done.stdout
    if "PYTHONCOERCECLOCALE" in locale:  # then a name is shown with the bytes that the shell has
        assert os.fsencode(folder) + b" holds" in done.stdout
    assert b"No such option" in done.stderr


@pytest.mark.slow
def test_bytes_of_a_name_come_back_where_the_locale_knows_no_better(tmp_path):
    """Names are shown and taken with the bytes that the shell has for them, as above."""
    folder = tmp_path / "é"
    folder.mkdir()
    odd = os.fsencode(tmp_path) + b"/\xe9"
    os.mkdir(odd)
    call = ["convert", folder, tmp_path / "x", "--to", "folder", "--then"]
    call += ["convert", os.fsdecode(odd), tmp_path / "x", "--to", "folder", "--then"]
    shown = python(IN_TURN, *call, PYTHONUTF8="1").stdout
    assert os.fsencode(folder) + b" holds" in shown
    assert odd + b" holds" in shown


def test_reports_are_written_in_any_locale(tmp_path):
    code = """
import sys
from pathlib import Path
from synface.reporting.page import write_page
write_page(Path("page.md"), "0.9 \\xb1 0.1, " + sys.argv[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "é"],
        cwd=tmp_path,
        env=os.environ | LOCALES[-1],
        check=False,
    )
    assert done.returncode == 0
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == "0.9 ± 0.1, é"


# -- packages that are missing


BLOCK = """
import sys
class Without:
    "A finder that does not find what is blocked."
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in BLOCKED:
            return self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
"""


@pytest.mark.parametrize("missing", ["typer", "rich"])
@pytest.mark.parametrize("words", [["--help"], ["train"], ["--version"]])
def test_without_the_extra_the_command_line_is_one_sentence(missing, words):
    done = python(f"BLOCKED = {[missing]}\n{BLOCK}{MAIN}", *words)
    assert done.returncode == 1
    assert done.stdout == b""
    wanted = (
        f"error: the command line needs {missing}, which is not installed: "
        'pip install "synface-kernels[train]"\n'
    )
    assert done.stderr.decode() == wanted


# A machine for training may lack everything that reads other formats, or that is measured against.
NOT_NEEDED = [
    *("tomli_w", "webdataset", "pyarrow", "onnxruntime", "tensorboard", "hypothesis", "faiss"),
    *("pytorch_metric_learning", "pykeops", "sklearn", "lightning", "pytorch_lightning", "timm"),
]


BLANK = """
from matplotlib.figure import Figure
Figure.savefig = lambda figure, path, **_: path.write_bytes(b"")
"""


@pytest.mark.slow
def test_train_and_pack_start_without_packages_they_do_not_use(tmp_path):
    from synface.common.toml import read_toml

    faces = folder(tmp_path / "faces", 4, 5)
    blocked = f"BLOCKED = {NOT_NEEDED}\n{BLOCK}{BLANK}{IN_TURN}"
    run, packed = tmp_path / "run", tmp_path / "packed.safetensors"
    words = ["pack", "--count", 8, "--dim", 4, "--steps", 2, "--output", packed, "--then"]
    words += ["train", "--data", faces, "--holdout", 2, "--output", run, *TINY, "--then"]
    done = python(blocked, *words)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.endswith(b"exit codes 0 0\n"), done.stdout.decode()
    assert read_toml(run / "config.toml")["embedding_size"] == 8
    assert packed.exists()


@pytest.mark.slow
def test_nothing_imports_dynamo_before_its_use():
    """Its import takes a second."""
    modules = "synface_kernels.ops.margin_cross_entropy synface.optim synface.heads"
    modules += " synface.cli.commands synface.training.loop synface.evaluation.report"
    code = "import importlib, sys; [*map(importlib.import_module, sys.argv[1:])]; "
    done = python(code + "print('torch._dynamo' in sys.modules)", *modules.split())
    assert (done.stdout, done.stderr) == (b"False\n", b"")


def test_a_package_that_fails_to_load_is_not_called_missing(monkeypatch, tmp_path):
    from synface.common.extras import extra

    (tmp_path / "broken_package.py").write_text("raise ImportError('its library is gone')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="its library is gone"), extra("train", "this"):
        import broken_package  # noqa: F401


EXTRAS = {"pyarrow": "parquet", "onnxruntime": "onnx"}
EXTRAS |= {name: name for name in ("tensorboard", "wandb", "mlflow", "timm")}
EXTRAS["pillow_heif"] = "heic"
USES = """
PIL from synface.data import open_images, read_folder; read_folder(open_images("faces"))
PIL from synface.synthesis.dataset import _write; _write(Path("x"), np.ones((2, 2, 1), "u1"))
skimage from synface.data import embedded_faces; embedded_faces()
safetensors from synface.common.files import write_tensors; write_tensors(Path("x"), {})
safetensors from synface.synthesis import read_embeddings; read_embeddings(Path("x.safetensors"))
matplotlib from synface.reporting.plots import loss_curve; loss_curve([], Path("x"))
matplotlib from synface.reporting.plots import figure; figure(1, 1)
matplotlib from synface.reporting.plots import roc_curves; roc_curves({}, Path("x"), title="")
markdown_it from synface.reporting.page import write_page; write_page(Path("x.html"), "")
scipy from synface.synthesis.packing.bounds import random_worst; random_worst(9, 4)
scipy from synface.synthesis.packing.bounds import best; best(9, 4)
pyarrow from synface.data import open_images; open_images("x.parquet")
onnxruntime from synface.synthesis.generators import open_generator; open_generator("x.onnx", 8)
pillow_heif from synface.data.formats.decode import _heif; _heif(open("x.heic", "rb"))
onnxruntime from synface.alignment import RetinaFace; RetinaFace()
safetensors from synface.training.initial import read_weights; read_weights(Path("x.safetensors"))
timm from synface.models.timm import resnet18
tensorboard from synface.training.loggers import check_loggers; check_loggers(["tensorboard"])
wandb from synface.training.loggers import check_loggers; check_loggers(["wandb"])
mlflow from synface.training.loggers import check_loggers; check_loggers(["mlflow"])
tensorboard from synface.training.loggers import TensorBoard; TensorBoard(Path("x"), 0, {}, None)
wandb from synface.training.loggers import WandB; WandB(Path("x"), 0, {}, None)
mlflow from synface.training.loggers import MLflow; MLflow(Path("x"), 0, {}, None)
""".strip().splitlines()
RUN_USES = """
from pathlib import Path
import numpy as np
for use in sys.argv[1:]:
    try:
        exec(use.partition(" ")[2])
        print("no error")
    except (ImportError, ValueError) as error:
        print(type(error).__name__, error)
"""


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    for person in "ab":
        (tmp_path / "faces" / person).mkdir(parents=True)
        (tmp_path / "faces" / person / "0.png").write_bytes(b"no image")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    (tmp_path / "x.heic").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    blocked = [use.partition(" ")[0] for use in USES]
    done = python(f"BLOCKED = {blocked}\n{BLOCK}{RUN_USES}", *USES)
    assert done.returncode == 0, done.stderr.decode()
    for missing, use, line in zip(blocked, USES, done.stdout.decode().splitlines(), strict=True):
        assert re.search(rf"\b{missing}\b", line), (use, line)
        extra = EXTRAS.get(missing, "train")
        assert f'pip install "synface-kernels[{extra}]"' in line, (use, line)


def test_every_import_of_an_extras_package_says_what_to_install():
    """Imports of typer and rich, which the command line needs, are all inside one `extra` block."""
    from synface.common.toml import read_toml

    extras = read_toml(ROOT / "pyproject.toml")["project"]["optional-dependencies"]
    modules = {"pillow": "PIL", "pillow-heif": "pillow_heif", "scikit-image": "skimage"}
    modules["markdown-it-py"] = "markdown_it"
    homes = {
        modules.get(name, name): extra
        for extra in ("train", "onnx", "parquet", "tensorboard", "heic")
        for name in (re.split("[>;]", requirement)[0] for requirement in extras[extra])
    }
    homes["torch.utils.tensorboard"] = "tensorboard"
    checked = set()
    for path in (ROOT / "python" / "synface").rglob("*.py"):
        if path.parent.name == "cli" and path.name != "__init__.py":
            continue
        tree = ast.parse(path.read_text())
        under: dict[ast.AST, str] = {}
        for node in ast.walk(tree):
            inside = None
            if isinstance(node, ast.With) and getattr(node.items[0].context_expr, "args", None):
                first = node.items[0].context_expr.args[0]
                inside = first.value if isinstance(first, ast.Constant) else None
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                inside = "checked alone"
            under |= (
                {child: inside for part in node.body for child in ast.walk(part)} if inside else {}
            )
        for node in ast.walk(tree):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""] * (node.level == 0)
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for name in names:
                home = homes.get(name) or homes.get(name.partition(".")[0])
                if home is not None:
                    assert under.get(node) in (home, "checked alone"), (path, name)
                    checked.add(home)
    assert checked == {"train", "onnx", "parquet", "tensorboard", "heic"}
