"""Problems of the margin softmax, run by any implementation, and how exact a result must be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

import synface_kernels as sk
from synface_kernels import _load
from synface_kernels.ops.margin_cross_entropy import op
from synface_kernels.testing import assert_as_exact_as_torch
from tests.helpers.cpu import cpu


def naive_logits(x, w, labels, angle_of) -> Tensor:
    """Return 64·cosine with the margin at each row's own label, as trainers write it."""
    cosine = F.normalize(x) @ F.normalize(w).T
    theta = cosine.clamp(-1, 1).acos()
    own = F.one_hot(labels, w.shape[0]).bool()
    return 64 * torch.where(own, angle_of(theta), cosine)


ISAS = _load.cpu_isas()
NAMES = ("loss", "grad_input", "grad_weight")
COMBINED = sk.CombinedMargin(64.0, 0.9, 0.4, 0.15)
MARGINS = {
    "arcface": sk.ArcFace(),
    "cosface": sk.CosFace(),
    "sphereface": sk.SphereFace(),
    "combined": COMBINED,
    "m2+m3": sk.CombinedMargin(32.0, 1.0, 0.3, 0.2),
}
FILTERED = {
    "drop": sk.ArcFace(interclass_filter=0.05),
    "zero": sk.ArcFace(interclass_filter=0.05, interclass_filter_mode="zero"),
    "all": sk.CosFace(interclass_filter=-1.0),
    "none": sk.SphereFace(interclass_filter=1.0, interclass_filter_mode="zero"),
}
OPTIONS = {
    "plain": {},
    "separate": {"mix": "separate"},
    "smoothing": {"label_smoothing": 0.1},
    "drop": {"margin": FILTERED["drop"]},
    "zero": {"margin": FILTERED["zero"]},
    "sub-centers": {},
}


def problem(n: int, c: int, d: int, k: int, dtype: torch.dtype, seed: int = 0):
    """Make input, weight, target, target_weight, the loss's gradient: float64, exact in dtype."""
    g = torch.Generator().manual_seed(seed + n + 7 * c + 31 * d + 101 * k)
    x = torch.randn(n, d, generator=g).to(dtype).double()
    w = torch.randn(c, d, generator=g).to(dtype).double()
    target = torch.randint(0, c, (n, k), generator=g)
    weight = torch.rand(n, k, generator=g, dtype=torch.float64).softmax(1) if k > 1 else None
    return x, w, target if k > 1 else target[:, 0], weight, torch.rand(n, generator=g).double()


def problem_of(n: int, c: int, m: int, d: int, k: int, dtype: torch.dtype):
    """Return a problem with m sub-centers for each class."""
    x, w, target, t, upstream = problem(n, c * m, d, k, dtype)
    return x, w.reshape(c, m, d), target % c, t, upstream


def sampled(c: int, share: float = 0.3) -> Tensor:
    """Return some of C classes, the first and the last among them."""
    ids = torch.rand(c, generator=torch.Generator().manual_seed(c)) < share
    ids[[0, -1]] = True
    return ids.nonzero().squeeze(1)


def gemm_dtype_of(dtype: torch.dtype, isa: str) -> torch.dtype | None:
    """Return bfloat16 where GEMMs take it as it is, with bfloat16 probabilities; else None."""
    return dtype if dtype == torch.bfloat16 and isa.endswith("bf16") else None


def run(x, w, target, target_weight, upstream, dtype, margin=COMBINED, **options):
    """Return the loss per row and both gradients, computed in dtype."""
    x, w = (v.to(dtype).requires_grad_() for v in (x, w))
    if target_weight is not None:
        target_weight = target_weight.float() if dtype != torch.float64 else target_weight
    loss = sk.margin_cross_entropy(
        x, w, target, margin, target_weight=target_weight, reduction="none", **options
    )
    return loss.detach(), *torch.autograd.grad(loss, (x, w), upstream.to(loss.dtype))


def assert_matches_float64(case, dtype, margin=COMBINED, isas=(None,), **options):
    """Assert errors of at most twice plain torch's, by each instruction set.

    Plain torch computes gradients in the GEMMs' dtype. None stands for the instruction set that is
    set, with GEMMs in dtype.
    """
    exact = run(*case, torch.float64, margin, **options, impl="reference")
    plain = {None: run(*case, dtype, margin, **options, impl="reference")}
    # The absolute terms: float32's ε times the size of a logit, and of a gradient before the part
    # along the vector is taken out (which leaves nothing at all where D = 1).
    ulp = torch.finfo(torch.float32).eps * margin.scale
    sizes = [1 / v.norm(dim=-1).min().item() for v in case[:2]]
    shifts = gradient_shifts(*case, margin, **options)
    atol = [2 * ulp, *(4 * ulp * size + shift for size, shift in zip(sizes, shifts, strict=True))]
    for isa in isas:
        gemm_dtype = isa and gemm_dtype_of(dtype, isa)
        if gemm_dtype not in plain:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(op, "statistics_dtype", lambda input, of=gemm_dtype: of)
                grads = run(*case, dtype, margin, **options, impl="reference")[1:]
            plain[gemm_dtype] = plain[None][0], *grads
        with cpu(isa=isa):
            assert isa in (None, _load.cpu_isa())
            actual = run(*case, dtype, margin, **options, impl="cpu")
        names = [f"{name}, {isa or _load.cpu_isa()}" for name in NAMES]
        for name, *results, tol in zip(names, actual, exact, plain[gemm_dtype], atol, strict=True):
            assert_as_exact_as_torch(*results, atol=tol, name=name)


class LastGemm(TorchFunctionMode):
    """A recorder of the last GEMM's factors and result: the definition's cosines."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.Tensor.matmul:
            self.last = *args, result
        return result


def gradient_shifts(x, w, target, target_weight, upstream, margin, **options) -> list[Tensor]:
    """Bound, per element, how far float32's cosines may shift the gradients by input and weight.

    A cosine, a sum of products, is off by about ε/2, so a probability, relatively, by scale·ε/2
    through its own logit and no more than that through the log-sum-exp: six times as much is beyond
    chance. The log-sum-exp's slope by a cosine is the probabilities' part of the loss's. It moves a
    row along the other side's unit vector, whose part along the row itself is taken out again: what
    is left is no longer than the sine between the two.
    """
    with LastGemm() as gemm:
        _, stats = sk.margin_cross_entropy(
            x.requires_grad_(), w, target, margin, target_weight=target_weight,
            reduction="none", return_stats=True, impl="reference", **options,
        )  # fmt: skip
    unit_x, unit_w, cosine = gemm.last
    (slope,) = torch.autograd.grad(stats.lse, cosine, upstream)
    off = 6 * torch.finfo(torch.float32).eps * margin.scale * slope.abs()
    sine = (1 - cosine.square()).clamp_min(0).sqrt()
    shifts = []
    for part, sin, other, own, rows in (
        (off, sine, unit_w.T, unit_x, x), (off.T, sine.T, unit_x, unit_w.T, w)
    ):  # fmt: skip
        shift, own = part @ other.abs(), own.abs()
        shift = shift + own * (own * shift).sum(1, keepdim=True)
        shift = torch.minimum(shift, (part * sin).sum(1, keepdim=True))
        shifts.append((shift.view_as(rows) / rows.norm(dim=-1, keepdim=True)).detach())
    return shifts
