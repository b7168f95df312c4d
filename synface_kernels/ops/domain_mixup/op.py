"""Domain mixup and identity mixup: checks, registrations, the public functions.

The op sees logical (B, C, H, W) tensors of any strides, ψ as (B,) float64, and each channel's mean
and standard deviation. All arithmetic is float64 in one fixed order, rounded once to the result's
dtype, so that every implementation gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..._check import describe, require_apart
from ..._derivatives import innermost, transformed
from ..._layout import check_layout
from ..._load import library
from ..._select import always, needs_cpu_extension, register, resolve
from . import reference

OP = "domain_mixup"
FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _needs_cuda_library(device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
    if device.type != "cuda":
        return f"runs on CUDA tensors, got {device}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"synface_kernels::{OP}_cuda", "CUDA"):
        return "the extension was built without CUDA (SYNFACE_CUDA=1 pip install ...)"
    return None


def _needs_triton(device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
    from ..._select import needs_triton

    # float64 is what this op computes in: unlike elsewhere, Triton takes it.
    return needs_triton(device, [dtype for dtype in dtypes if dtype != torch.float64])


register(
    OP,
    {
        "cuda": _needs_cuda_library,
        "cpu": needs_cpu_extension,
        "triton": _needs_triton,
        "reference": always,
    },
)

_INPUTS = "Tensor synthetic, Tensor real, Tensor psi, "
_AFFINE = "float[] mean, float[] std, "
_FLIPS = "Tensor? flip_synthetic, Tensor? flip_real, "
library.define(
    f"{OP}_forward({_INPUTS}{_AFFINE}{_FLIPS}ScalarType dtype, bool channels_last, str impl)"
    " -> Tensor"
)
library.define(f"{OP}_out({_INPUTS}{_AFFINE}{_FLIPS}Tensor(a!) out, str impl) -> ()")
library.define(
    f"{OP}_backward(Tensor gradient, {_INPUTS}{_AFFINE}{_FLIPS}bool needs_synthetic_grad, "
    "bool needs_real_grad, bool needs_psi_grad, str impl)"
    " -> (Tensor grad_synthetic, Tensor grad_real, Tensor grad_psi)"
)
for _key in ("cpu", "cuda"):  # implemented in csrc/bindings.cpp; affine is (C, 2)
    library.define(f"{OP}_{_key}({_INPUTS}Tensor affine, {_FLIPS}Tensor(a!) out) -> ()")
    library.define(
        f"{OP}_backward_{_key}(Tensor gradient, {_INPUTS}Tensor affine, {_FLIPS}"
        "Tensor(a!)? grad_synthetic, Tensor(b!)? grad_real, Tensor(c!)? grad_psi) -> ()"
    )


def domain_mixup(
    synthetic: Tensor,
    real: Tensor,
    psi: float | Tensor,
    *,
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.5,
    flip: tuple[Tensor | None, Tensor | None] | Tensor | None = None,
    layout: Literal["NHWC", "NCHW"] = "NHWC",
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Mixes a synthetic and a real batch pixel by pixel and normalizes the result, in one pass.

    X = ψ·X_S + (1 − ψ)·X_R, then (X − mean)/std for each channel. Bytes stand for value/255;
    floating images are taken as they are (usually already in [0, 1]): nothing is divided by 255.

    Args:
        synthetic: (B, H, W, C) images, or (B, C, H, W) with ``layout="NCHW"``: uint8, float32,
            float16, bfloat16 or float64. Any B, H and W, 0 too. Where the last dimension is
            none of 1, 3 and 4, and the second is, ``layout="NCHW"`` must be given.
        real: likewise, of the same shape, dtype and device.
        psi: the synthetic share, in [0, 1]: one number (float or 0-dimensional tensor) for the
            batch, or a floating-point (B,) tensor, one per sample.
        mean, std: one number, or C of them, in units of value/255 for bytes; std > 0.
        flip: which samples to mirror left to right before they are mixed: a pair
            (flip_synthetic, flip_real), each None or a (B,) bool tensor; or one (2, B) bool tensor.
        layout: how the images' dimensions are ordered, ``"NHWC"`` or ``"NCHW"``.
        dtype: of the result: float32, float16, bfloat16 or float64.
        memory_format: of the result: ``torch.contiguous_format`` or ``torch.channels_last``.
        out: (B, C, H, W) tensor of just that dtype and memory format to write into; it may not
            share memory with an image. Takes no part in autograd.
        impl: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; see `explain`.

    Returns:
        (B, C, H, W), whatever the input's layout; ``out`` if it was given.

    The arithmetic is float64, rounded once to ``dtype``. All implementations, and all instruction
    sets and thread counts of the CPU's, give the same bits.

    Differentiable in floating images and in ``psi``: ∂X_S = ψ·G/σ, ∂X_R = (1 − ψ)·G/σ,
    ∂ψ_b = Σ G·(X_S − X_R)/σ over sample b, summed in float64 in a fixed order. Derivatives of
    higher order are computed in plain torch, with a few copies of the images in float64; so is
    everything in forward-mode differentiation and under `torch.func`'s derivatives (``grad``,
    ``jvp``, …), which need an ``impl`` of ``"auto"`` or ``"reference"``.

    Memory above the inputs: the result, and with ``out`` nothing that grows with the images. An
    image whose samples are not dense in memory, as (C, H, W) or as (H, W, C), is copied by the CPU
    and CUDA implementations (``layout`` says nothing about memory: a permuted view is not copied).
    On a CPU, memory of freed results is kept for the next, 512 MiB at most: see `empty_cache`.
    Between forward and backward the images are kept.

    Raises:
        ValueError: for a wrong dtype, shape, device, memory format or value. On a GPU a ``psi``
            tensor is checked there, by an asynchronous assertion.
        TypeError: for an argument of a wrong Python type.
        RuntimeError: for an ``impl`` that cannot run here, naming the reason.

    Source: Qiu et al., "SynFace", ICCV 2021, eq. 4.
    """
    _check_images(synthetic, real, layout)
    if layout == "NHWC":
        synthetic, real = synthetic.permute(0, 3, 1, 2), real.permute(0, 3, 1, 2)
    batch, channels = synthetic.shape[:2]
    means, stds = _constants("mean", mean, channels), _constants("std", std, channels)
    if not all(s > 0 for s in stds):
        raise ValueError(f"std must be > 0, got {std}")
    flip_synthetic, flip_real = _flips(flip, batch, synthetic.device)
    _check_result(dtype, memory_format)
    chosen = resolve(OP, impl, (synthetic,))
    shares = _shares(psi, batch, synthetic.device)
    if transformed(synthetic, real, shares):
        if out is not None:
            raise ValueError(
                "out takes no part in autograd: call without it where torch.func or "
                "forward-mode differentiation is at work"
            )
        if impl not in ("auto", "reference"):
            raise RuntimeError(
                f"impl={impl!r} of {OP} cannot run here: torch.func's derivatives and forward-mode "
                "differentiation go through the reference; give impl='auto'"
            )
        inputs = Inputs(synthetic, real, shares, means, stds, flip_synthetic, flip_real)
        return _definition(inputs, dtype, memory_format)
    ops = torch.ops.synface_kernels
    if out is None:
        channels_last = memory_format == torch.channels_last
        return ops.domain_mixup_forward(
            synthetic, real, shares, means, stds, flip_synthetic, flip_real,
            dtype, channels_last, chosen,
        )  # fmt: skip
    _check_out(out, synthetic, dtype, memory_format)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (synthetic, real, shares, out)):
        raise ValueError(
            "out takes no part in autograd: call without it, or under torch.no_grad(), when "
            "synthetic, real, psi or out requires a gradient"
        )
    ops.domain_mixup_out(
        synthetic, real, shares, means, stds, flip_synthetic, flip_real, out, chosen
    )
    return out


def identity_mixup(alpha1: Tensor, alpha2: Tensor, phi: float | Tensor) -> Tensor:
    """Mixes identity coefficients: φ·α₁ + (1 − φ)·α₂.

    Args:
        alpha1, alpha2: (B, D) coefficient vectors of one floating-point dtype.
        phi: the share of ``alpha1``, in [0, 1]: one number (float or 0-dimensional tensor), or a
            floating-point (B,) tensor, one per sample.

    Returns:
        (B, D), in the coefficients' dtype. Differentiable in all three.

    Raises:
        ValueError: for a wrong dtype, shape, device or value; a tensor on a GPU is checked there,
            by an asynchronous assertion.
        TypeError: for an argument of a wrong Python type.

    Memory above the inputs: two tensors like ``alpha1``.

    Source: Qiu et al., "SynFace", ICCV 2021, eq. 2.
    """
    for name, alpha in (("alpha1", alpha1), ("alpha2", alpha2)):
        if not isinstance(alpha, Tensor):
            raise TypeError(f"{name} must be a tensor, got {describe(alpha)}")
    if alpha1.dim() != 2 or not alpha1.is_floating_point():
        raise ValueError(f"alpha1 must be floating point (B, D), got {describe(alpha1)}")
    if (alpha2.shape, alpha2.dtype, alpha2.device) != (alpha1.shape, alpha1.dtype, alpha1.device):
        raise ValueError(
            f"alpha2 must be like alpha1, got {describe(alpha2)} and alpha1 {describe(alpha1)}"
        )
    share = _shares(phi, alpha1.shape[0], alpha1.device, "phi")
    _require_shares(share, "phi")
    share = share.to(alpha1.dtype)[:, None]
    return share * alpha1 + (1 - share) * alpha2


# ---- checks --------------------------------------------------------------------------------------


def _check_images(synthetic: Tensor, real: Tensor, layout: str) -> None:
    if layout not in ("NHWC", "NCHW"):
        raise ValueError(f"layout must be 'NHWC' or 'NCHW', got {layout!r}")
    shape = "(B, H, W, C)" if layout == "NHWC" else "(B, C, H, W)"
    for name, images in (("synthetic", synthetic), ("real", real)):
        if not isinstance(images, Tensor):
            raise TypeError(f"{name} must be a tensor, got {describe(images)}")
        if images.dim() != 4 or images.dtype not in (torch.uint8, *FLOATING):
            raise ValueError(
                f"{name} must be uint8, float32, float16, bfloat16 or float64 of shape {shape}, "
                f"got {describe(images)}"
            )
    if (real.shape, real.dtype, real.device) != (
        synthetic.shape, synthetic.dtype, synthetic.device,
    ):  # fmt: skip
        raise ValueError(
            "real must be of the shape, dtype and device of synthetic, "
            f"got real {describe(real)} and synthetic {describe(synthetic)}"
        )
    check_layout(synthetic.shape, layout)


def _constants(name: str, value: float | Sequence[float], channels: int) -> list[float]:
    if isinstance(value, (int, float)):
        values = [float(value)] * channels
    elif isinstance(value, Sequence) and all(isinstance(v, (int, float)) for v in value):
        values = [float(v) for v in value]
    else:
        raise TypeError(f"{name} must be a number or a sequence of numbers, got {value!r}")
    if len(values) != channels:
        raise ValueError(f"{name} must be one number or C = {channels}, got {len(values)}")
    if not all(abs(v) < math.inf for v in values):  # which torch.compile can trace
        raise ValueError(f"{name} must be finite, got {value}")
    return values


def _flips(flip: Any, batch: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    if flip is None:
        return None, None
    if not isinstance(flip, (tuple, list, Tensor)):
        raise TypeError(f"flip must be None, a pair or a (2, B) bool tensor, got {describe(flip)}")
    if len(flip) != 2:
        raise ValueError(
            "flip must be a pair (flip_synthetic, flip_real) or a (2, B) bool tensor, "
            f"got {describe(flip) if isinstance(flip, Tensor) else f'{len(flip)} elements'}"
        )
    for name, side in zip(("flip_synthetic", "flip_real"), flip, strict=True):
        if side is None:
            continue
        if not isinstance(side, Tensor):
            raise TypeError(f"{name} must be None or a tensor, got {describe(side)}")
        if side.dtype != torch.bool or side.shape != (batch,) or side.device != device:
            raise ValueError(
                f"{name} must be bool of shape (B,) with B = {batch} on {device}, "
                f"got {describe(side)}"
            )
    return flip[0], flip[1]


def _check_result(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {describe(dtype)}")
    if dtype not in FLOATING:
        raise ValueError(f"dtype must be float32, float16, bfloat16 or float64, got {dtype}")
    if not isinstance(memory_format, torch.memory_format):
        raise TypeError(
            f"memory_format must be a torch.memory_format, got {describe(memory_format)}"
        )
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(
            "memory_format must be torch.contiguous_format or torch.channels_last, "
            f"got {memory_format}"
        )


def _check_out(
    out: Tensor, synthetic: Tensor, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor, got {describe(out)}")
    expected = (synthetic.shape, dtype, synthetic.device)
    if (out.shape, out.dtype, out.device) != expected:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"out must be {kind} {tuple(synthetic.shape)} on {synthetic.device}, "
            f"got {describe(out)}"
        )
    if not out.is_contiguous(memory_format=memory_format):
        raise ValueError(
            f"out must be contiguous in {memory_format}, got strides {tuple(out.stride())}"
        )


def _shares(psi: float | Tensor, batch: int, device: torch.device, name: str = "psi") -> Tensor:
    """ψ as (B,) float64; a number is checked here, a tensor where it is used."""
    if isinstance(psi, (int, float)):
        if not 0 <= psi <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {psi}")
        return torch.full((batch,), float(psi), dtype=torch.float64, device=device)
    if not isinstance(psi, Tensor):
        raise TypeError(f"{name} must be a number or a tensor, got {describe(psi)}")
    if not psi.is_floating_point() or psi.shape not in ((), (batch,)) or psi.device != device:
        raise ValueError(
            f"{name} must be floating point, of shape () or (B,) with B = {batch}, on {device}, "
            f"got {describe(psi)}"
        )
    return psi.double().expand(batch)


def _require_shares(psi: Tensor, name: str) -> None:
    """Raise unless shares are in [0, 1], on a GPU by an asynchronous assertion."""
    message = f"{name} must be in [0, 1]"
    compiling = torch.compiler.is_compiling()
    psi = psi if compiling else innermost(psi).detach()
    if psi.device.type != "cpu" or compiling:
        torch._assert_async(((psi >= 0) & (psi <= 1)).all(), message)
    elif psi.numel():
        least, most = (bound.item() for bound in psi.aminmax())  # NaN if any is
        if not (least >= 0 and most <= 1):
            *_, row = at = (~((psi >= 0) & (psi <= 1))).nonzero()[0].tolist()
            raise ValueError(f"{message}, got {psi[tuple(at)].item():g} in row {row}")


# ---- the op: implementations, fakes, autograd ----------------------------------------------------


class Inputs(NamedTuple):
    """What the ops' schemas begin with."""

    synthetic: Tensor
    real: Tensor
    psi: Tensor
    mean: list[float]
    std: list[float]
    flip_synthetic: Tensor | None
    flip_real: Tensor | None

    def prepared(
        self, traced: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return what implementations take: affine (C, 2) in place of mean and std.

        Where operations may be ``traced``, affine belongs to the trace and is not cached.
        """
        synthetic, real, psi, mean, std, flip_synthetic, flip_real = self
        make = _affine if traced else _cached_affine
        affine = make(tuple(mean), tuple(std), synthetic.dtype, synthetic.device)
        return synthetic, real, psi, affine, flip_synthetic, flip_real


def _split(args: tuple[Any, ...]) -> tuple[Inputs, tuple[Any, ...]]:
    count = len(Inputs._fields)
    return Inputs(*args[:count]), args[count:]


def _affine(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(C, 2) float64."""
    pairs = reference.affine(mean, std, dtype)
    return torch.tensor(pairs, dtype=torch.float64, device=device).view(-1, 2)


_cached_affine = lru_cache(maxsize=64)(_affine)  # so that a GPU is not waited for at each step


def _is_channels_last(images: Tensor) -> bool:
    _, channels, height, width = images.shape
    return channels > 1 and images.stride()[1:] == (1, width * channels, channels)


def _empty(images: Tensor, dtype: torch.dtype, channels_last: bool, impl: str = "") -> Tensor:
    if impl == "cpu":  # memory that earlier results gave back
        return torch.ops.synface_kernels._empty_result(images.shape, dtype, channels_last)
    return torch.empty(
        images.shape,
        dtype=dtype,
        device=images.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def _out(*args: Any) -> None:
    inputs, (out, impl) = _split(args)
    require_apart({"out": out}, inputs._asdict())
    _write(inputs, out, impl)


def _write(inputs: Inputs, out: Tensor, impl: str) -> None:
    _require_shares(inputs.psi, "psi")
    prepared = inputs.prepared()
    if impl == "reference":
        out.copy_(reference.round_once(reference.forward(*prepared), out.dtype))
    elif impl == "triton":
        from . import kernel_triton

        kernel_triton.forward(*prepared, out)
    else:
        getattr(torch.ops.synface_kernels, f"{OP}_{impl}")(*prepared, out)


def _definition(inputs: Inputs, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    """The definition as operations that all of torch's derivatives know; the same bits."""
    _require_shares(inputs.psi, "psi")
    mixed = reference.rounded(reference.forward(*inputs.prepared(traced=True)), dtype)
    return mixed.contiguous(memory_format=memory_format)


def _forward(*args: Any) -> Tensor:
    inputs, (dtype, channels_last, impl) = _split(args)
    out = _empty(inputs.synthetic, dtype, channels_last, impl)
    _write(inputs, out, impl)
    return out


def _backward(gradient: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, (*wanted, impl) = _split(args)
    results = _backward_empty(inputs, wanted, impl)
    prepared = (gradient, *inputs.prepared())
    if impl == "reference":
        exact = reference.backward(*prepared)
        for result, value, want in zip(results, exact, wanted, strict=True):
            if want:
                result.copy_(reference.round_once(value, result.dtype))
        return results
    targets = tuple(r if want else None for r, want in zip(results, wanted, strict=True))
    if impl == "triton":
        from . import kernel_triton

        kernel_triton.backward(*prepared, *targets)
    else:
        getattr(torch.ops.synface_kernels, f"{OP}_backward_{impl}")(*prepared, *targets)
    return results


def _backward_empty(
    inputs: Inputs, wanted: Sequence[bool], impl: str = ""
) -> tuple[Tensor, Tensor, Tensor]:
    needs_synthetic_grad, needs_real_grad, needs_psi_grad = wanted

    def images(side: Tensor, needed: bool) -> Tensor:
        if not needed:
            return side.new_empty(0)
        return _empty(side, side.dtype, _is_channels_last(side), impl)

    return (
        images(inputs.synthetic, needs_synthetic_grad),
        images(inputs.real, needs_real_grad),
        inputs.psi.new_empty(inputs.psi.shape if needs_psi_grad else (0,)),
    )


for _key in ("CPU", "CUDA"):
    library.impl(f"{OP}_forward", _forward, _key)
    library.impl(f"{OP}_out", _out, _key)
    library.impl(f"{OP}_backward", _backward, _key)


@torch.library.register_fake(f"synface_kernels::{OP}_forward")
def _forward_fake(*args: Any) -> Tensor:
    inputs, (dtype, channels_last, _) = _split(args)
    return _empty(inputs.synthetic, dtype, channels_last)


@torch.library.register_fake(f"synface_kernels::{OP}_out")
def _out_fake(*args: Any) -> None:
    return None


@torch.library.register_fake(f"synface_kernels::{OP}_backward")
def _backward_fake(gradient: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, (*wanted, _) = _split(args)
    return _backward_empty(inputs, wanted)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    synthetic, real, psi, ctx.mean, ctx.std, flip_synthetic, flip_real, _, _, ctx.impl = inputs
    ctx.save_for_backward(synthetic, real, psi, flip_synthetic, flip_real)


def _autograd(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    synthetic, real, psi, flip_synthetic, flip_real = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    gradients = torch.ops.synface_kernels.domain_mixup_backward(
        gradient, synthetic, real, psi, ctx.mean, ctx.std, flip_synthetic, flip_real,
        *needs, ctx.impl,
    )  # fmt: skip
    wanted = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return (*wanted, None, None, None, None, None, None, None)


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    gradient, synthetic, real, psi, ctx.mean, ctx.std, *flips = inputs[:8]
    ctx.wanted = inputs[8:11]
    ctx.save_for_backward(gradient, synthetic, real, psi, *flips)


def _second(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    gradient, synthetic, real, psi, *flips = ctx.saved_tensors
    inputs = Inputs(synthetic, real, psi, ctx.mean, ctx.std, *flips)
    like = (synthetic, real, psi)
    along = [
        g if want else torch.zeros_like(t)  # of a result that was not asked for
        for g, want, t in zip(gradients, ctx.wanted, like, strict=True)
    ]
    seconds = reference.second_backward(along, gradient, *inputs.prepared(traced=True))
    given = (
        second.to(t.dtype) if need else None
        for second, t, need in zip(seconds, (gradient, *like), ctx.needs_input_grad, strict=False)
    )
    return (*given, *[None] * 8)


for _name, _formula, _setup in (
    (f"{OP}_forward", _autograd, _setup_context),
    (f"{OP}_backward", _second, _setup_second),
):
    torch.library.register_autograd(f"synface_kernels::{_name}", _formula, setup_context=_setup)
