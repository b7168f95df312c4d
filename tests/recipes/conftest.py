"""What the recipes' tests share."""

from pathlib import Path

import pytest


@pytest.fixture
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The test module's TINY configuration as a file."""
    file = tmp_path / "tiny.toml"
    file.write_text(request.module.TINY)
    return file
