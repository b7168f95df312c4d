"""The documentation's code runs, and its statements hold."""

from __future__ import annotations

import pickle
import re
import shlex
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from synface.cli import app
from synface.common import distributed as ranks
from synface.data import convert, open_images
from typer.testing import CliRunner

from synface_kernels import _env

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


CONTINUES = "<!-- continues -->"  # the block below goes on in the namespace of the one above


def blocks(page: Path) -> list[tuple[int, bool, str]]:
    """Return each Python block of a page: its first line, whether it goes on, and its code."""
    text = page.read_text()
    found = re.finditer(rf"^({CONTINUES}\n)?```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, m.start(2)), bool(m[1]), m[2]) for m in found]


def run_blocks(page: Path) -> dict[str, object]:
    """Run a page's blocks, each in a namespace of its own unless it goes on; return the last."""
    names: dict[str, object] = {}
    for line, continues, code in blocks(page):
        if not continues:
            names = {"__name__": "__main__"}
        # The lines of an error are the page's.
        exec(compile("\n" * line + code, str(page), "exec"), names)
    return names


@pytest.fixture
def a_readers_folder(tmp_path, monkeypatch):
    """Write small files of those that the pages speak of, and set what torchrun would."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (24, 16, 16, 3), np.uint8)
    for i, image in enumerate(pixels):
        file = tmp_path / "orl" / f"s{i // 2}" / f"{i % 2}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    convert(open_images(tmp_path / "orl"), tmp_path / "orl-rec", "recordio")
    encoded = []
    for image in pixels:
        file = BytesIO()
        Image.fromarray(image).resize((112, 112)).save(file, "PNG")
        encoded.append(file.getvalue())
    same = [i % 2 == 0 for i in range(len(encoded) // 2)]
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps((encoded, same)))
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "0")  # any that is free
    yield
    if dist.is_initialized():
        ranks.leave()


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if p.name != "README.md" and blocks(p)],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_python_blocks_run(page, a_readers_folder):
    run_blocks(page)


def test_the_readmes_blocks_run_and_its_training_loop_learns(a_readers_folder, capsys):
    names = run_blocks(ROOT / "README.md")
    losses = [float(x) for x in re.findall(r"loss ([\d.]+), accuracy", capsys.readouterr().out)]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    loss = names["loss"]
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    assert names["centers"].grad.isfinite().all()


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text()
    linked = {(ROOT / "docs" / t).resolve() for t in re.findall(r"\]\(([^)#]+)", index)}
    pages = {page for page in (ROOT / "docs").rglob("*.md") if page.name != "index.md"}
    assert pages <= linked


@pytest.mark.slow
def test_the_chain_on_the_start_page_runs(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "start.md").read_text()
    chain = re.findall(r"^synface (pack|synthesize|train --data faces)(.*)$", text, re.MULTILINE)
    assert [command.split()[0] for command, _ in chain] == ["pack", "synthesize", "train"]
    smaller = {"count": 8, "steps": 20, "images-per-identity": 4, "epochs": 1, "holdout": 3}
    monkeypatch.chdir(tmp_path)
    for command, options in chain:
        for name, value in smaller.items():
            options = re.sub(rf"(--{name}) \d+", rf"\1 {value}", options)
        result = CliRunner().invoke(app, shlex.split(command + options))
        assert result.exit_code == 0, result.output
    assert "ROC-AUC" in result.output
    assert len(list(tmp_path.glob("faces/*/*.png"))) == 32


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_make_targets_exist(page):
    text = page.read_text()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)  # C++ has `](` too
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", prose):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"


def test_every_environment_variable_is_documented():
    quoted = re.compile(r"[\"'](SYNFACE_[A-Z0-9_]+)[\"']")  # C++ macros stand unquoted
    found = set()
    for folder in ("setup.py", "csrc/**/*", "synface_kernels/**/*", "python/**/*", "benchmarks/*"):
        for path in ROOT.glob(folder):
            if path.suffix in {".py", ".cpp", ".h", ".cu"}:
                found |= set(quoted.findall(path.read_text()))
    page = (ROOT / "docs" / "environment.md").read_text()
    documented = set(re.findall(r"^\| `([A-Z0-9_]+)`", page, re.MULTILINE))
    assert "SYNFACE_CPU_ISA" in found
    assert {name for name in documented if name.startswith("SYNFACE_")} == found
    assert set(_env.VARIABLES) == documented


def test_the_version_stands_in_one_place_only():
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert not re.search(r"^version:", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)


def test_license_is_the_whole_apache_license():
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text()
