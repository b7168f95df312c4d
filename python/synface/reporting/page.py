"""Report pages in Markdown, or rendered as HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path

from ..common.extras import extra

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #22313f; max-width: 52rem; margin: 2rem auto;
       padding: 0 1rem } img { max-width: 100% } pre { background: #f4f6f7; padding: 1rem }
table { border-collapse: collapse } td, th { padding: .3rem 1rem .3rem 0; text-align: left;
       border-bottom: 1px solid #dfe4e6 }
"""


def escape(text: object) -> str:
    """Return a text with Markdown's special characters escaped, for names of files or people."""
    return re.sub(r"([\\`*_{}\[\]<>()#+\-!|~&])", r"\\\1", " ".join(str(text).splitlines()))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; its cells are Markdown, too."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def write_page(path: Path, text: str) -> None:
    """Write a page in Markdown, or rendered as HTML if the path ends in .html.

    The encoding is UTF-8 in every locale; file names that are not valid UTF-8 keep their bytes.
    """
    if path.suffix == ".html":
        with extra("train", "writing pages"):
            from markdown_it import MarkdownIt

        rendered = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
        title = html.escape(re.sub(r"\\(.)", r"\1", text.partition("\n")[0].lstrip("# ")))
        text = (
            f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>'
            f"<style>{_STYLE}</style>\n{rendered}</html>\n"
        )
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
