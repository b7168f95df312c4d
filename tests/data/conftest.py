"""Two small folders of faces."""

from pathlib import Path

import pytest

from tests.helpers.images import folder


@pytest.fixture
def synthetic(tmp_path) -> Path:
    """Return a folder of twelve images of four people."""
    return folder(tmp_path / "synthetic", 4, 3, seed=1)


@pytest.fixture
def real(tmp_path) -> Path:
    """Return a folder of six images of three people."""
    return folder(tmp_path / "real", 3, 2, seed=2)
