"""Patches of Triton's interpreter: it rounds as the hardware does, and runs faster."""

import inspect
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture(params=["fused", "tiled"])
def design(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the margin softmax by each of its designs."""
    monkeypatch.setenv("SYNFACE_MARGIN_DESIGN", request.param)
    return request.param


@pytest.fixture(autouse=True)
def _round_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6's and 3.7's interpreters cut float32 off to bfloat16; compiled code rounds."""
    convert = interpreter._convert_float

    def rounding(data: np.ndarray, source: tl.dtype, to: tl.dtype, mode: Any) -> np.ndarray:
        if (source, to) != (tl.float32, tl.bfloat16):
            return convert(data, source, to, mode)
        rounded = torch.from_numpy(np.array(data, np.float32)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", rounding)


@cache
def _builtins(pkg: Any) -> list[str]:
    return [name for name, member in inspect.getmembers(pkg) if tl.core.is_builtin(member)]


@pytest.fixture(autouse=True)
def _look_for_builtins_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for triton.language's builtins once, not at each jit function's call."""

    def patch(pkg: Any, *how: Any) -> None:
        for name in _builtins(pkg):
            if tl.core.is_builtin(member := getattr(pkg, name)):
                interpreter._patch_attr(pkg, name, member, *how)

    monkeypatch.setattr(interpreter, "_patch_builtin", patch)
