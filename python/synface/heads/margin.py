"""Heads whose margin is fixed, or depends on each embedding's length (AdaFace, MagFace)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

import synface_kernels as sk

from ..common.check import check_integer, describe
from ..common.labels import labels_of
from .fused import FusedHead, raise_if_recomputed

_STATISTICS = ("norm_mean", "norm_std")  # AdaFace's buffers


class MarginHead(FusedHead):
    """Margin softmax over class centers, by `synface_kernels.margin_cross_entropy`.

    Args:
        embedding_size: D. num_classes: C. Both at least 1.
        margin: an `ArcFace` (the default), `CosFace`, `SphereFace` or `CombinedMargin`.
        sub_centers: M centers for each class, whose cosine is the greatest of the M.
        init_std: standard deviation of the centers' initial values; only their directions matter
            to the loss, but their lengths scale the step that a given learning rate takes.
        workspace: memory in which the forward pass may save cosines on a CPU, which shortens the
            backward pass: ``"auto"``, that of the centers' gradient, or a number of bytes.
        sparse: whether the centers' gradient of a pass with ``class_ids`` is a sparse tensor.
            False: a dense one, for any optimizer, which costs C·M·D at each step.
        impl: implementation of the op. device, dtype: of the centers.

    State dict: ``weight``, (C, D), or (C, M, D) with M > 1 sub-centers.

    Memory: C·M·D values, as much for their gradient, and ``workspace``, if it is a number.

    Source: Deng et al., "ArcFace", CVPR 2019; "Sub-center ArcFace", ECCV 2020.
    """

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        margin: sk.CombinedMargin | None = None,
        *,
        sub_centers: int = 1,
        init_std: float = 0.01,
        workspace: int | Literal["auto"] = "auto",
        sparse: bool = True,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_integer("embedding_size", embedding_size, 1)
        check_integer("num_classes", num_classes, 1)
        check_integer("sub_centers", sub_centers, 1)
        several = (sub_centers,) if sub_centers > 1 else ()
        super().__init__(
            (num_classes, *several, embedding_size), margin, init_std, workspace, sparse, impl,
            device, dtype,
        )  # fmt: skip
        MarginHead.reset_parameters(self)  # a subclass's own needs buffers that come later

    def reset_parameters(self) -> None:
        """Redraw the centers, and set the rest of the state dict to its initial values."""
        nn.init.normal_(self.weight, std=self.init_std)

    def forward(
        self,
        embeddings: Tensor,
        target: Tensor,
        target_weight: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Return the loss of (N, D) embeddings and (N,) or (N, K) labels.

        Labels may be of any integer dtype, and (N, 1) where they have no ``target_weight``.

        Args and errors: as `synface_kernels.margin_cross_entropy`, whose options (``mix``,
        ``reduction``, ``return_stats``, a per-batch ``margin``, …) may follow. `AdaFace` and
        `MagFace` compute their margin, and accept no other.
        """
        target = labels_of(target, target_weight is not None)
        return self._loss(embeddings, target, options | {"target_weight": target_weight})

    def _with_update(
        self, options: dict[str, Any], embeddings: Tensor, target: Tensor
    ) -> dict[str, Any]:
        options = super()._with_update(options, embeddings, target)
        if (
            options.get("update")
            and options.get("group") is None
            and dist.is_available()
            and dist.is_initialized()
            and dist.get_world_size() > 1
        ):
            raise ValueError(
                "a MarginHead that steps in its backward pass would step a separate copy of the "
                "centers on each rank: shard them (ShardedMarginHead, PartialFC)"
            )
        return options

    def extra_repr(self) -> str:
        classes, *sub_centers, size = self.weight.shape
        more = f"sub_centers={sub_centers[0]}, " if sub_centers else ""
        return f"embedding_size={size}, num_classes={classes}, {more}margin={self.margin}"


class AdaFace(MarginHead):
    """AdaFace: an angular margin for images of low quality, an additive one for high quality.

    An embedding's length ‖x_i‖ is a proxy for its image's quality. With μ and σ the running mean
    and standard deviation of these lengths,

        q_i = clip((‖x_i‖ − μ)·h/σ, −1, 1)
        g_angle = −m·q_i,  g_add = m·q_i + m
        ψ(cos θ) = cos(θ + g_angle) − g_add

    No gradient passes through q, as in the paper. In training mode each forward pass first updates
    μ and σ by those of its batch: μ ← momentum·μ_batch + (1 − momentum)·μ, and likewise σ. Ignored
    rows and lengths that are not finite are left out; σ needs at least two valid rows.

    Args:
        embedding_size: D. num_classes: C.
        scale: s. m: the margin, 0 ≤ m < π: radians in g_angle, a cosine in g_add (so below 1).
        h: concentration, > 0. σ is taken no smaller than 1e-3.
        momentum: share of the batch's statistics in the running ones, in (0, 1].
        options: as `MarginHead`.

    State dict: ``weight``, and the scalars ``norm_mean`` and ``norm_std``, which begin at 20 and
    100, as in the authors' code. These stay float32 under casts of the module (float64 after
    ``.double()``): in 16 bits a hundredth of a batch would be rounded away.

    The authors' code also clips θ + g_angle to [1e-3, π − 1e-3] and lengths to [1e-3, 100]; the
    paper does not, nor does this class.

    Source: Kim et al., "AdaFace: Quality Adaptive Margin for Face Recognition", CVPR 2022.
    """

    norm_mean: Tensor
    norm_std: Tensor

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        *,
        scale: float = 64.0,
        m: float = 0.4,
        h: float = 0.333,
        momentum: float = 0.01,
        **options: Any,
    ) -> None:
        if not 0 <= m < 1:
            raise ValueError(f"m must be in [0, 1), got {m}")
        if not 0 < h < math.inf:
            raise ValueError(f"h must be finite and positive, got {h}")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1], got {momentum}")
        super().__init__(embedding_size, num_classes, sk.CombinedMargin(scale), **options)
        self.m, self.h, self.momentum = m, h, momentum
        for name in _STATISTICS:
            empty = torch.empty((), device=self.weight.device, dtype=torch.float32)
            self.register_buffer(name, empty)
        self._reset_statistics()
        self.register_load_state_dict_pre_hook(_wide_statistics)

    def reset_parameters(self) -> None:
        """Redraw the centers, and reset the running statistics."""
        super().reset_parameters()
        self._reset_statistics()

    def _reset_statistics(self) -> None:
        self.norm_mean.fill_(20)
        self.norm_std.fill_(100)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = {name: self._buffers[name] for name in _STATISTICS}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if isinstance(old, Tensor) and isinstance(new, Tensor) and _narrow(new.dtype):
                self._buffers[name] = old.to(new.device, torch.float32)
        return self

    def _loss(
        self, embeddings: Tensor, target: Tensor, options: dict[str, Any], indices: Any = None
    ) -> Any:
        _refuse_margin(options)
        length = _lengths(embeddings).detach()
        mean, std = self.norm_mean, self.norm_std
        if self.training:
            labeled = _labeled(length, target, options)
            mean, std = self._settled(
                "running statistics", embeddings, target, lambda: self._statistics(length, labeled)
            )
            if torch.compiler.is_compiling():  # before their use, so that a recomputed pass raises
                mean, std = raise_if_recomputed(mean), raise_if_recomputed(std)
        quality = ((length - mean) * self.h / std.clamp_min(1e-3)).clamp(-1, 1)
        margin = replace(self.margin, m2=-self.m * quality, m3=self.m * quality + self.m)
        result = super()._loss(embeddings, target, options | {"margin": margin})
        if self.training:  # only now, so that an error does not change the state
            self.norm_mean.copy_(mean)
            self.norm_std.copy_(std)
        return result

    @torch.no_grad()
    def _statistics(self, length: Tensor, labeled: Tensor) -> tuple[Tensor, Tensor]:
        """Return the running mean and deviation after this batch, without synchronizing a GPU."""
        if _narrow(self.norm_mean.dtype) or _narrow(self.norm_std.dtype):  # cast one by one
            raise ValueError(
                "norm_mean and norm_std must be float32 or float64, or they would stop moving, got "
                f"{describe(self.norm_mean)} and {describe(self.norm_std)}: leave buffers out of "
                "the cast (FSDP: buffer_dtype=None)"
            )
        labeled = labeled & length.isfinite()
        number = labeled.sum()
        mean = torch.where(labeled, length, 0).sum() / number
        square = torch.where(labeled, length - mean, 0).square().sum()
        std = (square / (number - 1)).sqrt()
        first, second = (
            torch.where(enough, running.lerp(batch.to(running.dtype), self.momentum), running)
            for running, batch, enough in (
                (self.norm_mean, mean, number > 0),
                (self.norm_std, std, number > 1),
            )
        )
        return first, second

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, m={self.m}, h={self.h}, momentum={self.momentum}"


class MagFace(MarginHead):
    """MagFace: a margin that grows with the embedding's length, and a reward for length.

    With a_i = ‖x_i‖ clipped to [l_a, u_a],

        m(a) = l_m + (u_m − l_m)/(u_a − l_a)·(a − l_a)        radians
        g(a) = 1/a + a/u_a²                                    convex, least at a = u_a
        L_i = ArcFace with margin m(a_i) + lambda_g·g(a_i)

    Both m and g pass their gradient to the embedding's length, as in the paper, except where it
    is clipped.

    Args:
        embedding_size: D. num_classes: C.
        scale: s. l_a, u_a: 0 < l_a < u_a. l_m, u_m: margins there, 0 ≤ l_m ≤ u_m < π.
        lambda_g: ≥ 0. The paper's analysis asks for lambda_g ≥ s·K·u_a²/(u_a² − l_a²), with K the
            slope of m.
        beyond_pi: see `synface_kernels.CombinedMargin`. The default is that of the authors' code;
            its "easy margin" is ``"easy"``.
        options: as `MarginHead`.

    Source: Meng et al., "MagFace: A Universal Representation for Face Recognition and Quality
    Assessment", CVPR 2021.
    """

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        *,
        scale: float = 64.0,
        l_a: float = 10.0,
        u_a: float = 110.0,
        l_m: float = 0.45,
        u_m: float = 0.8,
        lambda_g: float = 35.0,
        beyond_pi: Literal["linear", "none", "easy"] = "linear",
        **options: Any,
    ) -> None:
        if not 0 < l_a < u_a < math.inf:
            raise ValueError(f"l_a and u_a must be finite, 0 < l_a < u_a, got {l_a} and {u_a}")
        if not 0 <= l_m <= u_m < math.pi:
            raise ValueError(
                f"l_m and u_m are angles in radians, 0 ≤ l_m ≤ u_m < π, got {l_m} and {u_m}"
            )
        if not 0 <= lambda_g < math.inf:
            raise ValueError(f"lambda_g must be finite and ≥ 0, got {lambda_g}")
        margin = sk.CombinedMargin(scale, beyond_pi=beyond_pi)
        super().__init__(embedding_size, num_classes, margin, **options)
        self.l_a, self.u_a, self.l_m, self.u_m, self.lambda_g = l_a, u_a, l_m, u_m, lambda_g

    def _loss(
        self, embeddings: Tensor, target: Tensor, options: dict[str, Any], indices: Any = None
    ) -> Any:
        _refuse_margin(options)
        length = _lengths(embeddings).clamp(self.l_a, self.u_a)
        labeled = _labeled(length, target, options)
        slope = (self.u_m - self.l_m) / (self.u_a - self.l_a)
        margin = replace(self.margin, m2=self.l_m + slope * (length - self.l_a))
        result = super()._loss(embeddings, target, options | {"margin": margin})
        penalty = torch.where(labeled, self.lambda_g * (1 / length + length / self.u_a**2), 0)
        reduction = options.get("reduction", "mean")
        if reduction == "mean":
            penalty = penalty.sum() / labeled.sum().clamp_min(1)
        elif reduction == "sum":
            penalty = penalty.sum()
        if options.get("return_stats"):
            loss, stats = result
            return loss + penalty, stats
        return result + penalty

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, l_a={self.l_a}, u_a={self.u_a}, l_m={self.l_m}, "
            f"u_m={self.u_m}, lambda_g={self.lambda_g}"
        )


def _narrow(dtype: torch.dtype) -> bool:
    return dtype not in (torch.float32, torch.float64)


def _wide_statistics(module: AdaFace, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Cast a checkpoint's 16-bit statistics, which ``assign=True`` would load as they are."""
    for name in _STATISTICS:
        value = state_dict.get(prefix + name)
        if isinstance(value, Tensor) and _narrow(value.dtype):
            state_dict[prefix + name] = value.to(torch.float32)


def _refuse_margin(options: dict[str, Any]) -> None:
    if "margin" in options:
        raise TypeError("this head computes its margin: margin cannot be given")


def _lengths(embeddings: Tensor) -> Tensor:
    """Return the (N,) Euclidean lengths, at least float32."""
    if not isinstance(embeddings, Tensor):
        raise TypeError(f"embeddings must be a tensor, got {describe(embeddings)}")
    if embeddings.dim() != 2 or not embeddings.is_floating_point():
        raise ValueError(
            f"embeddings must be floating point of shape (N, D), got {describe(embeddings)}"
        )
    dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(embeddings, dim=1, dtype=dtype)


def _labeled(length: Tensor, target: Tensor, options: dict[str, Any]) -> Tensor:
    """Return (N,) bool: the rows that have a label."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {describe(target)}")
    if target.dim() not in (1, 2) or target.shape[0] != length.shape[0]:
        raise ValueError(
            f"target must be int64 of shape (N,) or (N, K) with N = {length.shape[0]} as in "
            f"embeddings, got {describe(target)}"
        )
    present = target != options.get("ignore_index", -100)
    return present.any(1) if target.dim() == 2 else present
