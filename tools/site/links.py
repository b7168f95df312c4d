"""Links in the API reference, as an extension of Griffe: to other names, and to the code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parents[2]
ITEM = re.compile(r"^- \[`([\w.]+)`\]", re.MULTILINE)
PAGE = re.compile(r"(?<![\w/`])docs/([\w/]+)\.md")
NAME = re.compile(r"(?<![`\[\w])`([A-Za-z_][\w.]*)`(?![`\]])")  # not ``code``


def paths() -> list[str]:
    """Return the path of every name that a page of docs/api documents."""
    pages = sorted((ROOT / "docs" / "api").glob("*.md"))
    return [path for page in pages for path in ITEM.findall(page.read_text(encoding="utf-8"))]


def ends(path: str) -> list[str]:
    """Return the names by which docstrings may refer to a path, such as `heads.MarginHead`."""
    parts = path.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def documented(module: griffe.Object) -> Iterator[griffe.Object]:
    """Yield all objects of a module that have a docstring."""
    if module.docstring:
        yield module
    for member in module.members.values():
        if isinstance(member, griffe.Object):
            yield from documented(member)


class Links(griffe.Extension):
    """Turns `Name` and docs/page.md in docstrings into links, and adds one to the code."""

    def __init__(self) -> None:
        """Read the names of the reference, and the repository's address."""
        self.paths = paths()
        times = Counter(end for path in self.paths for end in ends(path))
        self.homes = {end: path for path in self.paths for end in ends(path) if times[end] == 1}
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        found = re.search(r'^Repository = "(.+)"$', project, re.MULTILINE)
        assert found is not None
        self.repository = found[1]

    def _link(self, name: re.Match[str]) -> str:
        home = self.homes.get(name[1])
        return f"[`{name[1]}`][{home}]" if home else name[0]

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Change the docstrings of a package once it is loaded."""
        for found in documented(pkg):
            assert found.docstring is not None
            text = NAME.sub(self._link, found.docstring.value)
            found.docstring.value = PAGE.sub(r"[docs/\1.md](../\1.md)", text)
        for path in self.paths:
            package, _, name = path.partition(".")
            if package == pkg.name and name:
                self._add_code(pkg[name])

    def _add_code(self, named: griffe.Object | griffe.Alias) -> None:
        found = named.final_target if isinstance(named, griffe.Alias) else named
        if found.docstring:
            file = Path(str(found.filepath)).resolve().relative_to(ROOT)
            address = f"{self.repository}/blob/main/{file}#L{found.lineno}"
            found.docstring.value += f"\n\n[Code]({address})"
