"""Patches of Triton's interpreter: it rounds as the hardware does, and runs faster."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
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
    patch = interpreter._patch_lang

    @cache
    def languages(function: Any) -> list[Any]:
        seen = {id(each) for each in function.__globals__.values()}
        return [each for each in (tl, tl.core) if id(each) in seen]

    def once(function: Any) -> Any:
        if any(tl.core.is_builtin(each.load) for each in languages(function)):
            return patch(function)
        return interpreter._LangPatchScope()

    monkeypatch.setattr(interpreter, "_patch_lang", once)


@pytest.fixture(autouse=True)
def _share_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check and wrap a shape once, not for each block's type and each tensor."""
    make_type, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    types: dict[tuple[int, ...], dict[str, Any]] = {}
    tensors: dict[tuple[int, ...], dict[str, Any]] = {}

    unwrap = tl.core._unwrap_if_constexpr

    def init_type(self: Any, element_ty: tl.dtype, shape: Any) -> None:
        sizes = shape.values if type(shape) is tl.tuple else shape
        key = (id(element_ty), *[n if type(n) is int else unwrap(n) for n in sizes])
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = vars(self).copy()  # keeps element_ty, so that no other gets its id
        vars(self).update(types[key])

    def init_tensor(self: Any, handle: Any, type: tl.dtype) -> None:
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in tensors:
            make_tensor(self, handle, type)
            tensors[shape] = vars(self).copy()
        vars(self).update(tensors[shape], handle=handle, type=type, dtype=type.scalar)

    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_unequal(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    monkeypatch.setattr(tl.block_type, "__init__", init_type)
    monkeypatch.setattr(tl.tensor, "__init__", init_tensor)
    monkeypatch.setattr(TritonSemantic, "broadcast_impl_value", broadcast_unequal)


@pytest.fixture(autouse=True)
def _skip_overflow_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the operations that find overflow: without debug mode nothing reads them."""
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    options = replace(builder.options, sanitize_overflow=False)
    monkeypatch.setattr(builder, "options", options)


@pytest.fixture(autouse=True)
def _look_up_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build the table of NumPy's dtypes once for each dtype, not at each operation."""
    get, cached = interpreter._get_np_dtype, cache(interpreter._get_np_dtype)

    def look_up(dtype: tl.dtype) -> np.dtype:
        scalar = dtype.scalar
        return get(scalar) if scalar.is_ptr() else cached(scalar)

    monkeypatch.setattr(interpreter, "_get_np_dtype", look_up)
