"""The `synface` command line: align, train, eval, embed, compare, export, pack and more."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from ..common.extras import extra
from ..common.interrupts import Terminated, sigterm_raises

if TYPE_CHECKING:
    from .commands import app as app


def main() -> None:
    """Run the command line; print expected errors as one line, without a traceback."""
    with sigterm_raises():
        _run()


def _run() -> None:
    try:
        with extra("train", "the command line"):
            from rich.markup import escape

            from .commands import app
            from .terminal import console, encode_anything, note_warnings
    except ImportError as error:
        raise SystemExit(f"error: {error}") from None
    encode_anything()
    console.log_to(None)
    shown = warnings.showwarning
    warnings.showwarning = note_warnings(shown)  # a run's log has them too
    try:
        app()
    except Terminated:
        console.print("terminated")
        raise
    except (ValueError, OSError, FloatingPointError, NotImplementedError, ImportError) as error:
        console.quiet = False
        console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
    finally:
        warnings.showwarning = shown


def __getattr__(name: str) -> object:
    """Import `app` on its first use, since it needs the packages of an extra."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .commands import app

    return app
