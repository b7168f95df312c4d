"""Patches of Triton's interpreter: it rounds as the hardware does, and runs faster."""

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


@pytest.fixture(autouse=True)
def _patch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patch triton.language at a kernel's launch, not again at each device function's call."""
    patch, languages = interpreter._patch_lang, (tl, tl.core)

    def once(function: Any) -> Any:
        seen = {id(each) for each in function.__globals__.values()}
        if any(id(each) in seen and tl.core.is_builtin(each.load) for each in languages):
            return patch(function)
        return interpreter._LangPatchScope()

    monkeypatch.setattr(interpreter, "_patch_lang", once)


@pytest.fixture(autouse=True)
def _look_up_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build the table of NumPy's dtypes once for each dtype, not at each operation."""
    get, cached = interpreter._get_np_dtype, cache(interpreter._get_np_dtype)

    def look_up(dtype: tl.dtype) -> np.dtype:
        scalar = dtype.scalar
        return get(scalar) if scalar.is_ptr() else cached(scalar)

    monkeypatch.setattr(interpreter, "_get_np_dtype", look_up)
