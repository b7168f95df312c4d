"""Calls of the command line in the tests' process."""

import io
import sys
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from unittest import mock

from synface import cli


def call(*arguments: object, code: int = 0) -> str:
    """Run a command in this process, and return what it printed; it must exit with ``code``."""
    shown, status = io.StringIO(), 0
    argv = ["synface", *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(cli, "sigterm_raises", nullcontext),  # the test run's signals are its own
        redirect_stdout(shown),
        redirect_stderr(shown),
    ):
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
    assert status == code, shown.getvalue()
    return shown.getvalue()


def refused(*arguments: object) -> str:
    """Run a command that must exit with a usage error (2), and return what it printed."""
    return call(*arguments, code=2)
