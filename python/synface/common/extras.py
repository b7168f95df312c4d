"""Packages that parts of the library need, and the extras that install them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str, what: object) -> Iterator[None]:
    """Make the imports inside raise an ImportError that says what to install.

    Args:
        name: the extra of `synface-kernels` that has the packages.
        what: what needs them, for the message: "drawing figures", or a file.

    Raises:
        ImportError: in place of ModuleNotFoundError. A package that is there and fails to load
            raises what it raises.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{what} needs {error.name}, which is not installed: "
            f'pip install "synface-kernels[{name}]"',
            name=error.name,
        ) from error
