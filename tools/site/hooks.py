"""The site's differences from the plain repository, as hooks of MkDocs.

docs/index.md states the navigation; README.md and other pages outside of docs/ that it lists become
pages, README.md the first. Notebooks become pages with the outputs that they hold. A link named
after a page's file gets that page's title, and one to any other file leads to the repository. Items
such as ``- [`package.name`](file.py)`` in docs/api become the name's docstring, formulas MathML.
"""

from __future__ import annotations

import html
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

log = logging.getLogger("mkdocs.hooks.site")  # its warnings fail a strict build
ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(
    r"(?P<before>(?:\[(?P<name>[\w/.-]+\.md)\]|\])\(|(?:src|href)=\")(?P<target>[^)#\s\"]+)"
)
ITEM = re.compile(r"^- \[`((?:synface|synface_kernels)[\w.]*)`\]\([^)]+\)$", re.MULTILINE)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def listed() -> dict[str, list[tuple[str, Path]]]:
    """Return the titles and files of the pages in docs/index.md, by section."""
    found: dict[str, list[tuple[str, Path]]] = {}
    section = ""
    for line in (DOCS / "index.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif row := re.match(r"\| \[([^\]]+)\]\(([^)#]+)\)", line):
            found.setdefault(section, []).append((row[1], (DOCS / row[2]).resolve()))
    return found


SECTIONS = listed()
PAGES = {path: title for section in SECTIONS.values() for title, path in section}


def uri_of(path: Path) -> str:
    """Return the site's name of a file of docs/ or of a page outside of it, such as README.md."""
    name = path.relative_to(DOCS if DOCS in path.parents else ROOT)
    return str(name.with_suffix(".md") if name.suffix == ".ipynb" else name)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Set the addresses and the navigation."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    urls = dict(re.findall(r'^(Documentation|Repository) = "(.+)"$', project, re.MULTILINE))
    config.site_url, config.repo_url = urls["Documentation"], urls["Repository"]
    config.repo_name = "Repository"
    config.nav = [
        {section: [{title: uri_of(path)} for title, path in pages]}
        for section, pages in SECTIONS.items()
    ]
    config.nav[0][next(iter(SECTIONS))].append({"All pages": "index.md"})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not Markdown files of docs/; README.md becomes the first page."""
    index = files.get_file_from_path("index.md")
    assert index is not None
    index.dest_uri = "contents.html"
    for path in PAGES:
        if not path.exists():
            continue  # MkDocs warns of it in the navigation
        if path.suffix == ".ipynb":
            text = from_notebook(json.loads(path.read_text(encoding="utf-8")))
        elif DOCS not in path.parents:
            text = path.read_text(encoding="utf-8")
        else:
            continue
        files.append(File.generated(config, uri_of(path), content=text))
    return files


def from_notebook(notebook: dict[str, Any]) -> str:
    """Return a notebook as Markdown: its text, code and outputs."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                image = "".join(data["image/png"]).replace("\n", "")
                parts.append(f'<img alt="output" src="data:image/png;base64,{image}">')
            else:
                parts.append("```text\n" + "".join(data["text/plain"]).rstrip() + "\n```")
    return "\n\n".join(parts)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links to files outside of docs/, and replace the items of the API's pages."""
    uri = page.file.src_uri
    source = next((path for path in PAGES if uri_of(path) == uri), DOCS / uri)
    if uri.startswith("api/"):
        markdown = ITEM.sub(r"\n::: \1\n", markdown)

    def rewritten(link: re.Match[str]) -> str:
        path = (source.parent / link["target"]).resolve()
        if ":" in link["target"] or not path.exists():
            return link[0]  # an address, or missing: MkDocs warns
        if path not in PAGES and DOCS not in path.parents:
            kind = "tree" if path.is_dir() else "blob"
            return f"{link['before']}{config.repo_url}/{kind}/main/{path.relative_to(ROOT)}"
        file = files.get_file_from_path(uri_of(path))
        if "=" in link["before"] and file is not None:  # MkDocs leaves HTML as it is
            return link["before"] + file.url_relative_to(page.file)
        named = link["name"] and path in PAGES  # by its file: the site has titles
        before = f"[{PAGES[path]}](" if named else link["before"]
        return before + os.path.relpath(uri_of(path), Path(uri).parent)

    markdown = LINK.sub(rewritten, markdown)
    if source.suffix == ".ipynb":
        markdown += f"\n\n[Download this notebook]({source.name})\n"
    return markdown


def on_page_content(html_: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace the formulas by MathML."""

    def formula(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        latex = html.unescape(match[2]).strip().replace("{aligned}", "{align*}")
        result = convert(latex, display=display)
        if unknown := re.search(r"\\\w+|<mi>&</mi>", result):
            log.warning("%s: unknown in a formula: %s", page.file.src_uri, unknown[0])
        return result

    return FORMULA.sub(formula, html_)
