"""A fixture of the recipes' tests."""

from pathlib import Path

import pytest


@pytest.fixture
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Write the test module's TINY configuration into a file."""
    file = tmp_path / "tiny.toml"
    file.write_text(request.module.TINY)
    return file
