"""Patches of Triton's interpreter, where it runs the GPU tests on the CPU; and lost GPUs."""

from __future__ import annotations

import os

import pytest

from tests.gpu import on_device

if on_device.DRY:
    from tests.triton.interpreted.conftest import (  # noqa: F401
        _look_up_dtypes,
        _patch_once,
        _round_to_nearest,
        _share_shapes,
        _skip_overflow_checks,
    )

FAILED: set[str] = set()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Note a test that raised; others make the report."""
    if call.excinfo is not None:
        FAILED.add(item.nodeid)


def pytest_runtest_logfinish(nodeid: str) -> None:
    """End the process after a test that left the GPU unusable: all later ones would fail too.

    Where pytest-xdist runs the tests, a new process takes the others.
    """
    if nodeid in FAILED and on_device.is_lost():
        os._exit(1)
