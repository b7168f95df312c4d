"""What the documentation says is so."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from synface.cli import app
from typer.testing import CliRunner

from synface_kernels import _env

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_code_in_the_readme_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in blocks:  # the second goes on where the first ends
            exec(compile(block, "README.md", "exec"), names)
    losses = [float(x) for x in re.findall(r"loss ([\d.]+), accuracy", capsys.readouterr().out)]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    loss = names["loss"]
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    assert names["centers"].grad.isfinite().all()


def test_the_chain_in_the_readme_runs(tmp_path, monkeypatch):
    chain = re.findall(r"^synface (pack|synthesize|train --data faces)(.*)$", README, re.MULTILINE)
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
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
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


def test_licence_is_the_whole_apache_licence():
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text()
