"""Patches of Triton's interpreter, where it runs the GPU tests on the CPU."""

from tests.gpu.on_device import DRY

if DRY:
    from tests.triton.interpreted.conftest import (  # noqa: F401
        _look_up_dtypes,
        _patch_once,
        _round_to_nearest,
        _share_shapes,
        _skip_overflow_checks,
    )
