"""Fixtures of the recipes' tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.sweeps import forked_workers


@pytest.fixture
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Write the test module's TINY configuration into a file."""
    file = tmp_path / "tiny.toml"
    file.write_text(request.module.TINY)
    return file


@pytest.fixture
def quick_workers() -> Iterator[None]:
    """Fork the workers, in a test that does not look at how they start."""
    with forked_workers():
        yield
