"""Workflows, forms, hooks and the changelog say what pyproject.toml and the Makefile say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from synface.common.toml import read_toml

ROOT = Path(__file__).resolve().parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = read_toml(ROOT / "pyproject.toml")["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# What jobs may do beyond reading the repository.
MAY_WRITE = {
    ("docs", "deploy"): {"pages": "write", "id-token": "write"},
    ("wheels", "release"): {"contents": "write"},
}
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
PRE_COMMIT = ROOT / ".pre-commit-config.yaml"
PAGES = [ROOT / name for name in ("CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "CHANGELOG.md")]
PAGES += [ROOT / ".github" / "pull_request_template.md"]
ADDRESS = PROJECT["urls"]["Homepage"]


def load(path: Path) -> dict[Any, Any]:
    return yaml.safe_load(path.read_text())


def jobs(name: str) -> dict[str, Any]:
    return load(ROOT / ".github" / "workflows" / f"{name}.yml")["jobs"]


def minor(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split(".")[:2])


def oldest(package: str) -> tuple[int, ...]:
    """Return the oldest version of a dependency that the metadata allow."""
    (found,) = (re.fullmatch(rf"{package}>=([\d.]+).*", each) for each in PROJECT["dependencies"]
                if each.startswith(f"{package}>"))  # fmt: skip
    assert found is not None
    return minor(found[1])


def newest(package: str) -> tuple[int, ...]:
    """Return the version of a package that `make build` installs."""
    found = re.search(rf"^{package.upper()} +\?= {package}==([\d.]+)$", MAKEFILE, re.MULTILINE)
    assert found is not None
    return minor(found[1])


def pythons() -> list[tuple[int, ...]]:
    """Return the Python versions of the classifiers."""
    names = [re.fullmatch(r".*Python :: (3\.\d+)", each) for each in PROJECT["classifiers"]]
    return sorted(minor(name[1]) for name in names if name)


def test_the_classifiers_begin_where_requires_python_does() -> None:
    versions = pythons()
    assert PROJECT["requires-python"] == ">=" + ".".join(map(str, versions[0]))
    assert versions == [(3, number) for number in range(versions[0][1], versions[-1][1] + 1)]


def test_tests_run_at_both_ends_of_the_supported_versions() -> None:
    first, last = jobs("checks")["test"]["strategy"]["matrix"]["include"]
    for entry, torch, triton, python in (
        (first, oldest("torch"), oldest("triton"), pythons()[0]),
        (last, newest("torch"), newest("triton"), pythons()[-1]),
    ):
        assert minor(entry["torch"]) == torch
        assert minor(entry["triton"]) == triton
        assert minor(entry["python"]) == python


def test_wheels_are_built_for_every_supported_torch() -> None:
    torches = [
        minor(version) for version in jobs("wheels")["wheels"]["strategy"]["matrix"]["torch"]
    ]
    first, last = oldest("torch"), newest("torch")
    assert torches == [(first[0], number) for number in range(first[1], last[1] + 1)]


@pytest.mark.parametrize("path", [*WORKFLOWS, PRE_COMMIT, *PAGES], ids=lambda path: path.name)
def test_make_targets_exist(path: Path) -> None:
    named = r"(?:^|`|run: |entry: )make ([a-z-]+)"
    for target in re.findall(named, path.read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), f"make {target}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_read_alone_and_names_versions(path: Path) -> None:
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"]
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] > 0
        assert job.get("permissions", {}) == MAY_WRITE.get((path.stem, name), {})
        for step in job["steps"]:
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step.get("uses", "a/b@v1")), step
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"] == {"persist-credentials": False}


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_a_form_asks_what_is_needed(path: Path) -> None:
    form = load(path)
    if path.stem == "config":
        return
    assert form["name"]
    assert form["description"]
    fields = {field["id"]: field for field in form["body"]}
    assert all(field["attributes"]["label"] for field in fields.values())
    if path.stem not in ("feature", "question"):
        assert "python -m synface_kernels" in fields["environment"]["attributes"]["description"]
        assert all(field["validations"]["required"] for field in fields.values())


def test_hooks_run_the_tools_of_make_lint() -> None:
    local = [repo for repo in load(PRE_COMMIT)["repos"] if repo["repo"] == "local"]
    entries = [hook["entry"].split() for repo in local for hook in repo["hooks"]]
    checks = ["lint", *re.search(r"^STATIC := (.*)$", MAKEFILE, re.MULTILINE)[1].split()]
    recipes = []
    for target in checks:
        lines = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)[1]
        recipes += lines.replace("$(BIN)/", "").replace("$(PY)", "python").splitlines()
    tools = {line.split()[0] for line in recipes}
    assert {words[0] for words in entries} == tools
    for words in entries:
        if words[0] == "python":
            assert f"\t{' '.join(words)}" in recipes


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_exist(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_addresses_are_the_projects() -> None:
    host = PROJECT["urls"]["Documentation"].split("/")[2]
    files = [*PAGES, *FORMS, ROOT / "CITATION.cff"]
    for path in files:
        for address in re.findall(r"https://[^\s)>\"]+", path.read_text()):
            if "synface-kernels" in address:
                assert address.startswith((ADDRESS, f"https://{host}/")), (path, address)


def test_the_changelog_begins_with_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    sections = re.findall(r"^## \[(.+)\](?: - (\d{4}-\d\d-\d\d))?$", text, re.MULTILINE)
    assert sections[0] == ("Unreleased", "")
    assert sections[1][0] == PROJECT["version"]
    assert all(date for _, date in sections[1:])
    for name, _ in sections:
        assert f"\n[{name}]: {ADDRESS}/" in text
    for kind in re.findall(r"^### (.+)$", text, re.MULTILINE):
        assert kind in {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
