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


def test_the_command_lines_reference_is_current():
    pytest.importorskip("typer")
    spec = importlib.util.spec_from_file_location("cli_reference", ROOT / "tools/cli_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    current = (DOCS / "api/cli.md").read_text(encoding="utf-8")
    assert current == module.page(), "run: python tools/cli_reference.py"


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


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site into a folder; return its pages by file."""
    for package in ("material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return {file: Page(file) for file in folder.rglob("*.html")}


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site):
    for file, page in site.items():
        outside = {a for a in page.loaded if urlsplit(a).netloc}
        assert not outside, f"{file.name}: {outside}"
    styles = [style for file in site for style in file.parent.rglob("*.css")]
    assert styles
    for style in set(styles):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text("utf-8"))


@pytest.mark.slow
def test_every_link_within_the_site_has_its_target(site):
    for file, page in site.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or file.name == "404.html":
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            assert target.exists(), f"{file.name}: {link}"
            if target in site:
                assert unquote(parts.fragment) in site[target].anchors, f"{file.name}: {link}"


@pytest.mark.slow
def test_links_to_the_repository_name_files_of_it(site):
    metadata = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^Repository = "(.+)"$', metadata, re.MULTILINE)
    assert found is not None
    links = {link for page in site.values() for link in page.links}
    named = {m[1] for link in links if (m := re.match(rf"{found[1]}/(?:blob|tree)/main/([^#]+)", link))}
    assert "synface_kernels/ops/margin_cross_entropy/op.py" in named
    assert "examples/plain_torch.py" in named
    assert not {name for name in named if not (ROOT / unquote(name)).exists()}


@pytest.mark.slow
def test_formulas_and_docstrings_are_rendered(site):
    (kernels,) = (page for file, page in site.items() if file.match("api/kernels.html"))
    assert "synface_kernels.margin_cross_entropy" in kernels.anchors
    assert "heads.html#synface.heads.MarginHead" not in kernels.links
