"""The documentation's site: built strictly and offline, with every page and every public name."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ITEM = re.compile(r"^- \[`([\w.]+)`\]\(([^)]+)\)$", re.MULTILINE)
SOURCES = {ROOT: "synface_kernels", ROOT / "python": "synface"}
REFERENCE = [
    (path, (page.parent / link).resolve())
    for page in sorted((DOCS / "api").glob("*.md"))
    for path, link in ITEM.findall(page.read_text(encoding="utf-8"))
]
# Packages whose names other packages of ours use, and nobody else.
INTERNAL = {"synface.cli", "synface.common"}


def resolve(path: str) -> object:
    """Return the object of a dotted path; import the modules on it."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        parent, _, name = path.rpartition(".")
        return getattr(resolve(parent), name)


def public_modules() -> list[str]:
    """Return the modules that state their public names in `__all__`."""
    found = []
    for root, package in SOURCES.items():
        for file in sorted((root / package).rglob("*.py")):
            if re.search(r"^__all__ = ", file.read_text(encoding="utf-8"), re.MULTILINE):
                parts = file.relative_to(root).with_suffix("").parts
                found.append(".".join(part for part in parts if part != "__init__"))
    return found


def test_every_package_that_exports_names_states_them():
    for root, package in SOURCES.items():
        for file in sorted((root / package).rglob("__init__.py")):
            name = ".".join(file.parent.relative_to(root).parts)
            text = file.read_text(encoding="utf-8")
            recipe = name.startswith("synface.recipes.")  # what `synface recipe` runs
            if "__getattr__" in text and name not in INTERNAL and not recipe:
                assert name in public_modules()


@pytest.mark.parametrize("module", public_modules())
def test_every_public_name_is_in_the_reference_and_has_a_docstring(module):
    documented = [resolve(path) for path, _ in REFERENCE]
    for name in importlib.import_module(module).__all__:
        found = getattr(importlib.import_module(module), name)
        if inspect.ismodule(found):
            assert found.__name__ in public_modules()
            continue
        assert any(found is each for each in documented), f"docs/api lacks {module}.{name}"
        if inspect.isroutine(found) or inspect.isclass(found):
            assert inspect.getdoc(found), f"{module}.{name} has no docstring"


@pytest.mark.parametrize(("path", "file"), REFERENCE, ids=[path for path, _ in REFERENCE])
def test_the_reference_names_what_exists_and_links_to_its_code(path, file):
    found = resolve(path)
    if inspect.isroutine(found) or inspect.isclass(found):
        assert Path(inspect.getsourcefile(inspect.unwrap(found)) or "") == file


def test_the_reference_has_every_name_once():
    names = [path for path, _ in REFERENCE]
    assert sorted(set(names)) == sorted(names)


def imported_in_documents() -> list[str]:
    """Return what the Python blocks of the documentation import from our packages."""
    found = set()
    for page in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        for code in re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.S | re.M):
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("synface"):
                    found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return sorted(found)


@pytest.mark.parametrize("path", imported_in_documents())
def test_what_the_documents_import_is_in_the_reference(path):
    found = resolve(path)
    if not inspect.ismodule(found):
        assert any(found is resolve(each) for each, _ in REFERENCE), path


def module_of(file: Path) -> Any:
    """Return the module of a file that is in no package."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_lines_reference_is_current():
    current = (DOCS / "api/cli.md").read_text(encoding="utf-8")
    expected = module_of(ROOT / "tools/cli_reference.py").page()
    assert current == expected, "run: python tools/cli_reference.py"


def test_the_gallery_has_every_picture_and_quotes_its_reports():
    text = (DOCS / "gallery.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"!\[[^\]]+\]\(results/([\w.-]+)\)", text))
    assert shown == {file.name for file in (DOCS / "results").glob("*.png")}
    reports = " ".join(" ".join(p.read_text("utf-8").split()) for p in DOCS.glob("results/*.md"))
    quotes = re.findall(r"^> (.+)$", text, re.MULTILINE)
    assert quotes
    for quote in quotes:
        assert quote in reports


class Page(HTMLParser):
    """A page's anchors, links, and the addresses that a browser loads by itself."""

    def __init__(self, file: Path) -> None:
        """Parse a file."""
        super().__init__()
        self.anchors: set[str] = {""}
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the tag's id and addresses."""
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        addresses = {given[name] for name in ("href", "src", "srcset", "data") if name in given}
        if tag == "a":
            self.links |= addresses
        elif given.get("rel") != "canonical":  # the page's own address, which nothing loads
            self.loaded |= addresses


def built(folder: Path) -> dict[Path, Page]:
    """Build the site into a folder; return its pages by file."""
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return {file: Page(file) for file in folder.rglob("*.html")}


def check_nothing_is_loaded_from_elsewhere(site: dict[Path, Page]) -> None:
    for file, page in site.items():
        outside = {address for address in page.loaded if urlsplit(address).netloc}
        assert not outside, f"{file.name} loads {outside}"


def check_links_within_the_site(site: dict[Path, Page]) -> None:
    for file, page in site.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or file.name == "404.html":  # its links begin at the site's address
                continue
            target = Path(os.path.normpath(file.parent / unquote(parts.path)))
            target = target if parts.path else file
            assert target in site or target.exists(), f"{file.name} links to {link}"
            if target in site:
                assert unquote(parts.fragment) in site[target].anchors, f"{file.name}: {link}"


def check_links_to_the_repository(site: dict[Path, Page]) -> None:
    metadata = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    address = re.search(r'^Repository = "(.+)"$', metadata, re.MULTILINE)
    assert address is not None
    prefix = re.compile(rf"{re.escape(address[1])}/(?:blob|tree)/main/([^#]+)")
    links = {link for page in site.values() for link in page.links}
    files = {unquote(m[1]) for link in links if (m := prefix.match(link))}
    assert {"examples/plain_torch.py", "synface_kernels/ops/row_update/op.py"} <= files
    assert not {name for name in files if not (ROOT / name).exists()}


def check_the_reference_is_rendered(site: dict[Path, Page]) -> None:
    anchors = set().union(*(page.anchors for page in site.values()))
    assert {path for path, _ in REFERENCE} <= anchors


@pytest.mark.slow
def test_the_site_is_strict_offline_and_whole(tmp_path):
    """One test, since each process of pytest-xdist would build the site anew."""
    pytest.importorskip("material")
    site = built(tmp_path)
    check_nothing_is_loaded_from_elsewhere(site)
    check_links_within_the_site(site)
    check_links_to_the_repository(site)
    check_the_reference_is_rendered(site)


def hooks() -> Any:
    """Return the module of the site's hooks."""
    for package in ("mkdocs", "latex2mathml"):
        pytest.importorskip(package)
    return module_of(ROOT / "tools/site/hooks.py")


def test_formulas_become_mathml():
    markdown = pytest.importorskip("markdown")
    text = "Costs $5 and $6.\n\nIf $s \\cdot x_i > 0$:\n\n$$\n\\sum_j \\frac{t_j}{2}\n$$\n\n`$x$`"
    options = {"pymdownx.arithmatex": {"generic": True}}
    page = markdown.markdown(text, extensions=list(options), extension_configs=options)
    page = hooks().on_page_content(page, page=None, config=None, files=None)
    assert page.count("<math") == 2
    assert page.count('display="block"') == 1
    assert "<mfrac>" in page
    assert "<msub><mi>x</mi><mi>i</mi></msub>" in page
    assert "Costs $5 and $6." in page
    assert "<code>$x$</code>" in page


def test_an_unknown_command_in_a_formula_is_a_warning(caplog):
    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    formula = r'<span class="arithmatex">\(\unheard x\)</span>'
    hooks().on_page_content(formula, page=page, config=None, files=None)
    assert r"page.md: unknown in a formula: \unheard" in caplog.text


def test_notebooks_become_pages_with_their_outputs():
    notebook = {
        "cells": [
            {"cell_type": "markdown", "source": ["# Title\n", "Text."]},
            {
                "cell_type": "code",
                "source": ["print(1)"],
                "outputs": [
                    {"output_type": "stream", "text": ["1\n"]},
                    {
                        "output_type": "display_data",
                        "data": {"image/png": "iVBO\n", "text/plain": "x"},
                    },
                ],
            },
        ]
    }
    text = hooks().from_notebook(notebook)
    assert text.startswith("# Title\nText.\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n\n<img")
    assert 'data:image/png;base64,iVBO"' in text
