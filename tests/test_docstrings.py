"""Docstrings begin with a whole sentence, after PEP 257; `make lint` runs this file.

ruff's D400 and D401 see the missing period and the verb that is not in the imperative; a first
word that no sentence of its kind begins with, they don't.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("synface_kernels", "python/synface", "benchmarks", "tests", "tools", "examples")
# Words that begin a fragment, which leans on the name above it.
FRAGMENT = {
    "and", "as", "at", "because", "but", "by", "during", "for", "from", "how", "if", "in",
    "into", "like", "nor", "of", "on", "or", "out", "so", "than", "that", "though", "through",
    "to", "under", "until", "upon", "what", "when", "where", "whether", "which", "while", "who",
    "whom", "whose", "why", "with", "within", "without",
}  # fmt: skip
# Words that begin a description of a thing, where a function is to say what it does.
THING = FRAGMENT | {
    "a", "all", "an", "another", "any", "both", "each", "either", "every", "few", "he", "her",
    "his", "it", "its", "many", "most", "neither", "no", "none", "one", "other", "our",
    "several", "she", "some", "such", "the", "their", "there", "these", "they", "this", "those",
    "two", "we", "you", "your",
}  # fmt: skip


def begins_with_a_fragment(node, text):
    word = text.strip().split()[0].strip("`*_,.:;").lower() if text.strip() else ""
    is_property = any(
        ast.unparse(d).split(".")[-1].split("(")[0] in ("property", "cached_property", "setter")
        for d in getattr(node, "decorator_list", ())
    )
    function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_property
    test = function and node.name.startswith("test")
    if function and not test:
        return word in THING or not text[0].isalpha()
    return word in FRAGMENT


@pytest.mark.parametrize("package", PACKAGES)
def test_no_docstring_begins_with_a_fragment(package):
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and begins_with_a_fragment(node, text):
                    line = getattr(node, "lineno", 1)
                    found.append(f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}")
    assert not found, "\n".join(found)
