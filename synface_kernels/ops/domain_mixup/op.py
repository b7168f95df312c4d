"""Domain mixup and identity mixup: checks, registrations, the public functions.

The op sees logical (B, C, H, W) tensors of any strides, ψ as (B,) float64, and each channel's mean
and standard deviation. All arithmetic is float64 in one fixed order, rounded once to the result's
dtype, so that every implementation returns the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ... import _cuda
from ..._check import capturing, describe, is_dense, require_apart
from ..._derivatives import transformed, under_vmap
from ..._load import library
from ..._select import always, needs_cpu_extension, register, resolve
from . import checks, reference
from .reference import Gradients, Operands

OP = "domain_mixup"


def _needs_cuda_kernels(device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
    if device.type != "cuda":
        return f"runs on CUDA tensors, got {device}"
    return _cuda.missing(OP)


def _prepare_cuda(device: torch.device) -> str | None:
    return _cuda.compile_at_first_use(OP) if device.type == "cuda" else None


_prepare_cuda._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _needs_triton(device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
    from ..._select import needs_triton

    # This op computes in float64, so unlike elsewhere its Triton kernel supports it.
    return needs_triton(device, [dtype for dtype in dtypes if dtype != torch.float64])


register(
    OP,
    {
        "cuda": _needs_cuda_kernels,
        "cpu": needs_cpu_extension,
        "triton": _needs_triton,
        "reference": always,
    },
    preparations={"cuda": _prepare_cuda},
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
for _key in ("cpu", "cuda"):  # implemented in csrc/; affine is (C, 2)
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
    """Mix a synthetic and a real batch pixel by pixel and normalize the result, in one pass.

    X = ψ·X_S + (1 − ψ)·X_R, then (X − mean)/std for each channel. Only uint8 images are divided by
    255; floating-point images are usually in [0, 1] already.

    Args:
        synthetic: (B, H, W, C) images, or (B, C, H, W) with ``layout="NCHW"``: uint8, float32,
            float16, bfloat16 or float64. Any B, H and W, 0 too. Where the last dimension is
            none of 1, 3 and 4, and the second is one of them, ``layout="NCHW"`` is required.
        real: likewise, of the same shape, dtype and device.
        psi: ψ in [0, 1], the share of synthetic: one number (float or 0-dimensional tensor) for
            the batch, or a floating-point (B,) tensor, one per sample.
        mean, std: one number, or C of them, in [0, 1] units also for uint8 images; std > 0.
        flip: which samples to flip horizontally before they are mixed: a pair
            (flip_synthetic, flip_real), each None or a (B,) bool tensor; or one (2, B) bool tensor.
        layout: how the images' dimensions are ordered, ``"NHWC"`` or ``"NCHW"``.
        dtype: of the result: float32, float16, bfloat16 or float64.
        memory_format: of the result: ``torch.contiguous_format`` or ``torch.channels_last``.
        out: (B, C, H, W) tensor of exactly that dtype and memory format to write into; it may not
            share memory with an image. Not differentiable, nor under `torch.vmap`.
        impl: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; see `explain`.
            Where the build has no CUDA kernels, ``"cuda"`` compiles them once, which takes about
            a minute and needs a CUDA toolkit.

    Returns:
        (B, C, H, W), whatever the input's layout; ``out`` if it was given.

    The arithmetic is float64, rounded once to ``dtype``. All implementations, instruction sets and
    numbers of threads return the same bits.

    Differentiable in floating images and in ``psi``: ∂X_S = ψ·G/σ, ∂X_R = (1 − ψ)·G/σ,
    ∂ψ_b = Σ G·(X_S − X_R)/σ over sample b, summed in float64 in a fixed order. Derivatives of
    higher order are computed in plain torch, with a few copies of the images in float64; so is
    everything in forward-mode differentiation and under `torch.func`'s derivatives (``grad``,
    ``jvp``, …), which need an ``impl`` of ``"auto"`` or ``"reference"``.

    Memory above the inputs: the result, and with ``out`` nothing that grows with the images. An
    image whose samples are not dense in memory, as (C, H, W) or as (H, W, C), is copied by the CPU
    and CUDA implementations (``layout`` is the order of dimensions, not of memory: a permuted view
    is not copied). CPU results come from a caching allocator: see
    `empty_cache`. The images are saved from forward to backward.

    Raises:
        ValueError: for a wrong dtype, shape, device, memory format or value. A ``psi`` tensor on a
            GPU is checked by an asynchronous assertion.
        TypeError: for an argument of a wrong Python type.
        RuntimeError: for an ``impl`` that cannot run here, naming the reason.

    Source: Qiu et al., "SynFace", ICCV 2021, eq. 4.
    """
    checks.check_images(synthetic, real, layout)
    if layout == "NHWC":
        synthetic, real = synthetic.permute(0, 3, 1, 2), real.permute(0, 3, 1, 2)
    batch, channels = synthetic.shape[:2]
    means, stds = checks.constants("mean", mean, channels), checks.constants("std", std, channels)
    if not all(s > 0 for s in stds):
        raise ValueError(f"std must be > 0, got {std}")
    flip_synthetic, flip_real = checks.flips(flip, batch, synthetic.device)
    checks.check_result(dtype, memory_format)
    chosen = resolve(OP, impl, (synthetic,))
    shares = checks.shares(psi, batch, synthetic.device)
    inputs = Inputs(synthetic, real, shares, means, stds, flip_synthetic, flip_real)
    if transformed(synthetic, real, shares):
        if out is not None:
            raise ValueError(
                "out takes no part in autograd: call without it under torch.func or "
                "forward-mode differentiation"
            )
        if impl not in ("auto", "reference"):
            raise RuntimeError(
                f"impl={impl!r} of {OP} cannot run here: torch.func's derivatives and forward-mode "
                "differentiation go through the reference; use impl='auto'"
            )
        return _definition(inputs, dtype, memory_format)
    ops = torch.ops.synface_kernels
    if out is None:
        channels_last = memory_format == torch.channels_last
        return ops.domain_mixup_forward(*inputs, dtype, channels_last, chosen)
    if under_vmap():
        raise ValueError("out cannot be written under torch.vmap: call without it")
    checks.check_out(out, synthetic, dtype, memory_format)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (synthetic, real, shares, out)):
        raise ValueError(
            "out takes no part in autograd: call without it, or under torch.no_grad(), when "
            "synthetic, real, psi or out requires a gradient"
        )
    ops.domain_mixup_out(*inputs, out, chosen)
    return out


def identity_mixup(alpha1: Tensor, alpha2: Tensor, phi: float | Tensor) -> Tensor:
    """Mix identity coefficients: φ·α₁ + (1 − φ)·α₂.

    Args:
        alpha1, alpha2: (B, D) coefficient vectors of one floating-point dtype.
        phi: the share of ``alpha1``, in [0, 1]: one number (float or 0-dimensional tensor), or a
            floating-point (B,) tensor, one per sample.

    Returns:
        (B, D), in the coefficients' dtype. Differentiable in all three.

    Raises:
        ValueError: for a wrong dtype, shape, device or value; values on a GPU are checked by an
            asynchronous assertion.
        TypeError: for an argument of a wrong Python type.

    Memory above the inputs: two tensors like ``alpha1``.

    Source: Qiu et al., "SynFace", ICCV 2021, eq. 2.
    """
    for name, alpha in (("alpha1", alpha1), ("alpha2", alpha2)):
        if not is_dense(alpha):
            raise TypeError(f"{name} must be a tensor, got {describe(alpha)}")
    if alpha1.dim() != 2 or not alpha1.is_floating_point():
        raise ValueError(f"alpha1 must be floating point (B, D), got {describe(alpha1)}")
    if (alpha2.shape, alpha2.dtype, alpha2.device) != (alpha1.shape, alpha1.dtype, alpha1.device):
        raise ValueError(
            f"alpha2 must be like alpha1, got {describe(alpha2)} and alpha1 {describe(alpha1)}"
        )
    share = checks.shares(phi, alpha1.shape[0], alpha1.device, "phi")
    checks.require_shares(share, "phi")
    share = share.to(alpha1.dtype)[:, None]
    return share * alpha1 + (1 - share) * alpha2


# ---- the op: implementations, fakes, autograd ----------------------------------------------------


class Inputs(NamedTuple):
    """The arguments that begin the ops' schemas."""

    synthetic: Tensor
    real: Tensor
    psi: Tensor
    mean: list[float]
    std: list[float]
    flip_synthetic: Tensor | None
    flip_real: Tensor | None

    def operands(self, traced: bool = False) -> Operands:
        """Return the inputs of an implementation: affine (C, 2) in place of mean and std.

        Where operations may be ``traced``, affine belongs to the trace and is not cached; nor
        where a CUDA graph is captured, which computes it at its replays.
        """
        images = self.synthetic
        arguments = tuple(self.mean), tuple(self.std), images.dtype, images.device
        if traced or capturing(images):
            affine = _affine(*arguments)
        else:  # on a GPU, other streams would have to wait for its values
            on_gpu = images.device.type == "cuda"
            stream = torch.cuda.current_stream(images.device).cuda_stream if on_gpu else 0
            affine = _cached_affine(*arguments, stream)
        return Operands(
            self.synthetic, self.real, self.psi, affine, self.flip_synthetic, self.flip_real
        )


def _split(args: Sequence[Any]) -> tuple[Inputs, Sequence[Any]]:
    """Split an op's arguments into its inputs and the rest of its schema."""
    count = len(Inputs._fields)
    return Inputs(*args[:count]), args[count:]


def _affine(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return each channel's shift and scale, (C, 2) float64."""
    pairs = reference.affine(mean, std, dtype)
    if device.type == "cpu":
        return torch.tensor(pairs, dtype=torch.float64, device=device).view(-1, 2)

    # Fills take their values as arguments; a copy from the host would wait for the GPU.
    def filled(value: float) -> Tensor:
        return torch.full((), value, dtype=torch.float64, device=device)

    if len(set(pairs)) == 1:  # channels alike
        return torch.stack([filled(value) for value in pairs[0]]).repeat(len(pairs), 1)
    if not pairs:
        return torch.empty((0, 2), dtype=torch.float64, device=device)
    return torch.stack([filled(value) for pair in pairs for value in pair]).view(-1, 2)


@lru_cache(maxsize=64)
def _cached_affine(
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype,
    device: torch.device,
    stream: int,
) -> Tensor:
    """Return `_affine`'s result for the work of one stream, from a cache."""
    return _affine(mean, std, dtype, device)


def _is_channels_last(images: Tensor) -> bool:
    _, channels, height, width = images.shape
    return channels > 1 and images.stride()[1:] == (1, width * channels, channels)


def _empty(images: Tensor, dtype: torch.dtype, channels_last: bool, impl: str = "") -> Tensor:
    if impl == "cpu":  # from the caching allocator
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
    checks.require_shares(inputs.psi, "psi")
    operands = inputs.operands()
    if impl == "reference":
        out.copy_(reference.round_once(reference.forward(operands), out.dtype))
    elif impl == "triton":
        from . import kernel_triton

        kernel_triton.forward(operands, out)
    else:
        getattr(torch.ops.synface_kernels, f"{OP}_{impl}")(*operands, out)


def _definition(inputs: Inputs, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    """Mix in torch operations that support all of torch's derivatives, with the same bits."""
    checks.require_shares(inputs.psi, "psi")
    mixed = reference.rounded(reference.forward(inputs.operands(traced=True)), dtype)
    return mixed.contiguous(memory_format=memory_format)


def _forward(*args: Any) -> Tensor:
    inputs, (dtype, channels_last, impl) = _split(args)
    out = _empty(inputs.synthetic, dtype, channels_last, impl)
    _write(inputs, out, impl)
    return out


def _backward(gradient: Tensor, *args: Any) -> Gradients:
    inputs, (*wanted, impl) = _split(args)
    results = _backward_empty(inputs, wanted, impl)
    operands = inputs.operands()
    if impl == "reference":
        exact = reference.backward(gradient, operands)
        for result, value, want in zip(results, exact, wanted, strict=True):
            if want:
                result.copy_(reference.round_once(value, result.dtype))
        return results
    targets = [r if want else None for r, want in zip(results, wanted, strict=True)]
    if impl == "triton":
        from . import kernel_triton

        kernel_triton.backward(gradient, operands, *targets)
    else:
        run = getattr(torch.ops.synface_kernels, f"{OP}_backward_{impl}")
        run(gradient, *operands, *targets)
    return results


def _backward_empty(inputs: Inputs, wanted: Sequence[bool], impl: str = "") -> Gradients:
    needs_synthetic_grad, needs_real_grad, needs_psi_grad = wanted

    def images(side: Tensor, needed: bool) -> Tensor:
        if not needed:
            return side.new_empty(0)
        return _empty(side, side.dtype, _is_channels_last(side), impl)

    return Gradients(
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
def _backward_fake(gradient: Tensor, *args: Any) -> Gradients:
    inputs, (*wanted, _) = _split(args)
    return _backward_empty(inputs, wanted)


def _save(ctx: Any, inputs: Inputs, *others: Tensor) -> None:
    ctx.mean, ctx.std = inputs.mean, inputs.std
    tensors = inputs._replace(mean=None, std=None)  # type: ignore[arg-type]
    ctx.save_for_backward(*tensors, *others)


def _saved(ctx: Any) -> tuple[Inputs, Sequence[Tensor]]:
    inputs, others = _split(ctx.saved_tensors)
    return inputs._replace(mean=ctx.mean, std=ctx.std), others


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    given, (_, _, ctx.impl) = _split(inputs)
    _save(ctx, given)


def _autograd(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    inputs, _ = _saved(ctx)
    needs_synthetic, needs_real, needs_psi, *others = ctx.needs_input_grad
    needs = (needs_synthetic, needs_real, needs_psi)
    gradients = torch.ops.synface_kernels.domain_mixup_backward(gradient, *inputs, *needs, ctx.impl)
    wanted = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return (*wanted, *[None] * len(others))


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    gradient, *others = inputs
    given, (*ctx.wanted, _) = _split(others)
    _save(ctx, given, gradient)


def _second(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
    inputs, (gradient,) = _saved(ctx)
    like = (inputs.synthetic, inputs.real, inputs.psi)
    given = Gradients(*(
        g if want else torch.zeros_like(t)  # of a result that was not computed
        for g, want, t in zip(upstream, ctx.wanted, like, strict=True)
    ))  # fmt: skip
    seconds = reference.second_backward(given, gradient, inputs.operands(traced=True))
    results = [
        second.to(t.dtype) if need else None
        for second, t, need in zip(seconds, (gradient, *like), ctx.needs_input_grad, strict=False)
    ]
    return (*results, *[None] * (len(ctx.needs_input_grad) - len(results)))


for _name, _formula, _setup in (
    (f"{OP}_forward", _autograd, _setup_context),
    (f"{OP}_backward", _second, _setup_second),
):
    torch.library.register_autograd(f"synface_kernels::{_name}", _formula, setup_context=_setup)
