"""Packages that parts of the library need, and the extras that install them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str, what: object) -> Iterator[None]:
    """Make the imports inside raise an ImportError that says what to install.

    Args:
        name: extra of `synface-kernels` that has the packages.
        what: the feature that needs them, for the message: "drawing figures", or a file.

    Raises:
        ImportError: in place of ModuleNotFoundError. An installed package that fails to import
            raises its own error.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{what} needs {error.name}, which is not installed: "
            f'pip install "synface-kernels[{name}]"',
            name=error.name,
        ) from error
