"""Functions and classes that a user names as ``package.module:name``."""

from __future__ import annotations

import re
from importlib import import_module
from operator import attrgetter
from typing import Any

SPEC = re.compile(r"\w[\w.]*:\w[\w.]*")


def imported(what: str, spec: str) -> Any:
    """Import what ``package.module:name`` names; the name may have dots.

    Args:
        what: it, for messages.

    Raises:
        ValueError: if it cannot be imported, whatever the module raises.
    """
    module, _, name = spec.partition(":")
    try:
        return attrgetter(name)(import_module(module))
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, (ImportError, AttributeError)):  # raised by the module's own code
            reason = f"{type(error).__name__}: {reason}"
        raise ValueError(
            f"{what} cannot be imported: {reason}; its package must be installed, or in a folder "
            "of PYTHONPATH"
        ) from error
