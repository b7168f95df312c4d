"""Mixing batches: draws the shares, mixes the pixels in one pass, and says what each image now is.

A mixed image has K labels with weights that sum to 1, in the form that
`synface_kernels.margin_cross_entropy` takes: targets (N, K) and weights (N, K), never (N, C).

Every random number is drawn from the `torch.Generator` that a call is given (None: the CPU's global
one), on that generator's device. So one seed of a CPU generator means one result, whatever device
the images are on. A GPU is never waited for: what was drawn is sent to it, and labels on it are
checked by asynchronous assertions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

import synface_kernels as sk

from .check import check_integer, check_number, describe
from .mixing_parts import (
    check_images,
    check_labels,
    check_layout,
    check_rows_sum_to_one,
    cutmix_boxes,
    exact_weights,
    image_size,
    kept_share,
    paired_labels,
    paste,
)
from .ratios import SYNFACE_GRID, Beta, Constant, Grid, Ratio, permutation, send, uniform
from .timm_mixup import TimmMixup

__all__ = [
    "Beta", "Constant", "CutMix", "DomainMixup", "Grid", "IdentityMixup", "Mixed",
    "MixedIdentities", "Mixup", "Ratio", "TimmMixup",
]  # fmt: skip


class Mixed(NamedTuple):
    """A mixed batch.

    Attributes:
        images: (N, C, H, W), normalised.
        targets: (N, K) int64 labels of each image; they may coincide.
        weights: (N, K) float32 share of each label, a multiple of 2⁻²⁴; a row sums to 1 exactly.
    """

    images: Tensor
    targets: Tensor
    weights: Tensor


class MixedIdentities(NamedTuple):
    """Mixed identity coefficients (N, D), and as in `Mixed` their targets and weights (N, 2)."""

    coefficients: Tensor
    targets: Tensor
    weights: Tensor


# ---- two domains ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Mixer:
    """What all mixers of images share.

    Attributes:
        ratio: how shares are distributed: a `Grid`, a `Beta`, a `Constant`, or anything with
            their ``sample``.
        per_sample: a share for each image; otherwise one for the batch.
        mean, std, dtype, memory_format, layout, impl: as `synface_kernels.domain_mixup` takes them.
    """

    ratio: Ratio = SYNFACE_GRID
    per_sample: bool = False
    mean: float | Sequence[float] = 0.5
    std: float | Sequence[float] = 0.5
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    layout: Literal["NHWC", "NCHW"] = "NHWC"
    impl: str = "auto"

    def __post_init__(self) -> None:
        _check_ratio(self.ratio)
        check_layout(self.layout)

    def _shares(self, batch: int, generator: Generator | None) -> Tensor:
        """(B,), or (1,) for the whole batch; float64, where they were drawn."""
        return self.ratio.sample(batch if self.per_sample else 1, generator)

    def _mix(
        self,
        synthetic: Tensor,
        real: Tensor,
        psi: Tensor,
        out: Tensor | None,
        flip: Tensor | None = None,
    ) -> Tensor:
        return sk.domain_mixup(
            synthetic, real, psi, mean=self.mean, std=self.std, flip=flip, layout=self.layout,
            dtype=self.dtype, memory_format=self.memory_format, out=out, impl=self.impl,
        )  # fmt: skip


@dataclass(frozen=True)
class DomainMixup(_Mixer):
    """Mixes a synthetic batch with a real one, ψ·X_S + (1 − ψ)·X_R, and concatenates their labels.

    Real label i becomes num_synthetic + i. The classifier has ``num_classes`` classes.

    Args:
        num_synthetic, num_real: identities in each domain, at least 1.
        ratio: the distribution of ψ; SynFace's grid by default.
        per_sample: draw a ψ for each image; SynFace draws one for the batch.
        flip: probability with which an image is mirrored; each side of each pair on its own.
        mean, std, dtype, memory_format, layout, impl: as `synface_kernels.domain_mixup` takes them.

    Raises:
        TypeError, ValueError: for a wrong argument, naming it.

    Source: Qiu et al., "SynFace", ICCV 2021, eq. 4.
    """

    num_synthetic: int
    num_real: int
    _: KW_ONLY
    flip: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("num_synthetic", self.num_synthetic, 1)
        check_integer("num_real", self.num_real, 1)
        check_number("flip", self.flip, 0, 1)

    @property
    def num_classes(self) -> int:
        return self.num_synthetic + self.num_real

    def __call__(
        self,
        synthetic: Tensor,
        synthetic_labels: Tensor,
        real: Tensor,
        real_labels: Tensor,
        *,
        synthetic_weights: Tensor | None = None,
        generator: Generator | None = None,
        out: Tensor | None = None,
    ) -> Mixed:
        """Mixes two batches.

        Args:
            synthetic: (N, H, W, C) images, or (N, C, H, W) with ``layout="NCHW"``; uint8 or
                floating point. real: (R, …), likewise. Image i meets real image i mod R, so a
                shorter real batch is repeated, and of a longer one the first N are used.
            synthetic_labels: (N,) integers in [0, num_synthetic); or (N, J), as identity mixup
                returns them, together with ``synthetic_weights`` (N, J), floating point, ≥ 0, each
                row summing to 1.
            real_labels: (R,) integers in [0, num_real). Labels may also be (N, 1) and (R, 1).
            out: to write the images into; see `synface_kernels.domain_mixup`.

        Returns:
            `Mixed` with K = 2 labels per image, or J + 1: the synthetic ones with weight
            ψ·(their weight), and the real one with 1 − ψ.

        Differentiable in floating images. Memory above the inputs: the result; a copy of the real
        batch at N images, in its own dtype, if it is the shorter one.

        Raises:
            TypeError, ValueError: for a wrong argument, naming it.
        """
        check_images("synthetic", synthetic, self.layout)
        check_images("real", real, self.layout)
        batch, device = len(synthetic), synthetic.device
        if batch and not len(real):
            raise ValueError(f"real must hold at least one image, got {describe(real)}")
        real_labels = check_labels("real_labels", real_labels, real, self.num_real)
        synthetic_labels = check_labels(
            "synthetic_labels", synthetic_labels, synthetic, self.num_synthetic, several=True
        )
        own = _own_weights(synthetic_labels, synthetic_weights)

        shares, flips = self.draw(batch, generator)
        psi = send(shares, device)
        flip = None if flips is None else send(flips, device)
        images = self._mix(synthetic, _cycled(real, batch), psi, out, flip)
        return Mixed(images, *self._label(synthetic_labels, own, _cycled(real_labels, batch), psi))

    def draw(self, batch: int, generator: Generator | None = None) -> tuple[Tensor, Tensor | None]:
        """All that is random in a call: ψ (B,) float64; and which images to flip, (2, B) or None.

        For who mixes elsewhere, as workers do with `synface_kernels.numpy.domain_mixup`.
        """
        psi = self._shares(batch, generator).expand(batch)
        return psi, uniform((2, batch), generator) < self.flip if self.flip > 0 else None

    def label(
        self, synthetic_labels: Tensor, real_labels: Tensor, psi: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Targets and weights (N, 2) of images mixed elsewhere, by (N,) labels and the ψ drawn.

        Raises:
            TypeError, ValueError: for wrong labels, naming them.
        """
        real_labels = check_labels("real_labels", real_labels, psi, self.num_real)
        labels = check_labels("synthetic_labels", synthetic_labels, psi, self.num_synthetic)
        return self._label(labels, _own_weights(labels, None), real_labels, psi)

    def _label(
        self, labels: Tensor, own: Tensor, real_labels: Tensor, psi: Tensor
    ) -> tuple[Tensor, Tensor]:
        others = real_labels + self.num_synthetic
        targets = torch.cat([labels.view(own.shape), others[:, None]], 1)
        shares = torch.cat([psi[:, None] * own, 1 - psi[:, None]], 1)
        return targets, exact_weights(shares)


@dataclass(frozen=True)
class IdentityMixup:
    """Mixes each identity of a batch with another: φ·α + (1 − φ)·α', one φ for each image.

    The partners α' are the batch in a random order, so an identity may meet itself.

    Args:
        ratio: the distribution of φ; SynFace's grid by default.

    Source: Qiu et al., "SynFace", ICCV 2021, eq. 2.
    """

    ratio: Ratio = SYNFACE_GRID

    def __post_init__(self) -> None:
        _check_ratio(self.ratio)

    def __call__(
        self, alpha: Tensor, labels: Tensor, generator: Generator | None = None
    ) -> MixedIdentities:
        """Mixes the coefficients of a batch.

        Args:
            alpha: (N, D) floating-point identity coefficients.
            labels: (N,) or (N, 1) integers, ≥ 0.

        Returns:
            `MixedIdentities`: coefficients (N, D), differentiable in ``alpha``, targets and
            weights (N, 2).

        Memory above the inputs: three tensors like ``alpha``.

        Raises:
            TypeError, ValueError: for a wrong argument, naming it.
        """
        if not isinstance(alpha, Tensor):
            raise TypeError(f"alpha must be a tensor, got {describe(alpha)}")
        if alpha.dim() != 2 or not alpha.is_floating_point():
            raise ValueError(f"alpha must be floating point (N, D), got {describe(alpha)}")
        labels = check_labels("labels", labels, alpha)
        order = send(permutation(len(alpha), generator), alpha.device)
        phi = send(self.ratio.sample(len(alpha), generator), alpha.device)
        return MixedIdentities(
            sk.identity_mixup(alpha, alpha[order], phi), *paired_labels(labels, labels[order], phi)
        )


# ---- one batch with itself -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _OneBatch(_Mixer):
    """A mixer of a batch with itself.

    Attributes:
        partner: which image each one is mixed with: those of a random ``"permutation"``, or those
            of the batch in ``"reverse"`` order.
    """

    partner: Literal["permutation", "reverse"] = "permutation"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.partner not in ("permutation", "reverse"):
            raise ValueError(f"partner must be 'permutation' or 'reverse', got {self.partner!r}")

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        generator: Generator | None = None,
        *,
        out: Tensor | None = None,
    ) -> Mixed:
        """Mixes a batch.

        Args:
            images: (N, H, W, C), or (N, C, H, W) with ``layout="NCHW"``; uint8 or floating point.
                Any N.
            labels: (N,) or (N, 1) integers, ≥ 0.
            out: to write the images into; see `synface_kernels.domain_mixup`.

        Returns:
            `Mixed` with K = 2 labels per image.

        Differentiable in floating images.

        Raises:
            TypeError, ValueError: for a wrong argument, naming it.
        """
        check_images("images", images, self.layout)
        labels = check_labels("labels", labels, images)
        order = self._partners(images, generator)
        mixed, share = self._with(images, order, generator, out)
        return Mixed(mixed, *paired_labels(labels, labels[order], share))

    def _with(
        self, images: Tensor, order: Tensor, generator: Generator | None, out: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The images mixed with their partners images[order], and the share (N,) of their own
        labels."""
        raise NotImplementedError

    def _partners(self, images: Tensor, generator: Generator | None) -> Tensor:
        if self.partner == "reverse":
            return torch.arange(len(images), device=images.device).flip(0)
        return send(permutation(len(images), generator), images.device)


@dataclass(frozen=True, kw_only=True)
class Mixup(_OneBatch):
    """Mixes the images of a batch with one another: λ·X + (1 − λ)·X'.

    Args:
        ratio: the distribution of λ; ``Beta(a)`` is the paper's, a grid of 21 values the default.
        per_sample: draw a λ for each image, otherwise one for the batch.
        partner: ``"permutation"`` draws a partner for each image, ``"reverse"`` takes the batch in
            reverse order.
        mean, std, dtype, memory_format, layout, impl: as `synface_kernels.domain_mixup` takes them.

    Memory above the inputs: the result, and a copy of the images in their own dtype.

    Source: Zhang et al., "mixup", ICLR 2018.
    """

    def _with(
        self, images: Tensor, order: Tensor, generator: Generator | None, out: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        share = send(self._shares(len(images), generator), images.device).expand(len(images))
        return self._mix(images, images.index_select(0, order), share, out), share


@dataclass(frozen=True, kw_only=True)
class CutMix(_OneBatch):
    """Pastes a box of another image of the batch into each.

    The box has √(1 − λ) of the image's height and of its width, each rounded down to an even number
    of pixels; its centre is uniform over the pixels, and what reaches beyond the border is cut off.
    An image's own label weighs exactly the share of pixels that it kept.

    Args:
        ratio: the distribution of λ; ``Beta(1.0)`` is the paper's, a grid of 21 values the default.
        per_sample: draw λ and box for each image, otherwise once for the batch.
        partner: ``"permutation"`` draws a partner for each image, ``"reverse"`` takes the batch in
            reverse order.
        mean, std, dtype, memory_format, layout, impl: as `synface_kernels.domain_mixup` takes them.

    Memory above the inputs: the result, and a copy of the images in their own dtype; on a GPU, or
    with gradients, two copies and a byte for each of their elements.

    Source: Yun et al., "CutMix", ICCV 2019.
    """

    def _with(
        self, images: Tensor, order: Tensor, generator: Generator | None, out: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        height, width = image_size(images, self.layout)
        boxes = cutmix_boxes(height, width, self._shares(len(images), generator), generator)
        share = send(kept_share(boxes, height, width), images.device).expand(len(images))
        boxes = send(boxes, images.device)
        pasted = paste(images, images, order, boxes, self.layout)
        return self._mix(pasted, pasted.detach(), torch.ones_like(share), out), share


# ---- labels and checks of two domains -----------------------------------------------------------


def _cycled(rows: Tensor, count: int) -> Tensor:
    """Row i of the result is row i mod len(rows)."""
    if len(rows) >= count:
        return rows[:count]
    whole, rest = divmod(count, len(rows))
    return torch.cat([rows] * whole + [rows[:rest]])


def _own_weights(labels: Tensor, weights: Tensor | None) -> Tensor:
    """What each label of a synthetic image weighs before it is mixed, (N, J) float64."""
    if labels.dim() == 1 and weights is not None:
        raise ValueError("synthetic_weights must be None with (N,) synthetic_labels")
    if weights is None:
        if labels.dim() == 1 or labels.shape[1] == 1:
            return torch.ones(len(labels), 1, dtype=torch.float64, device=labels.device)
        raise ValueError(
            f"synthetic_weights (N, J) is required with synthetic_labels {describe(labels)}"
        )
    if not isinstance(weights, Tensor):
        raise TypeError(f"synthetic_weights must be a tensor, got {describe(weights)}")
    if (
        not weights.is_floating_point()
        or weights.shape != labels.shape
        or weights.device != labels.device
    ):
        raise ValueError(
            "synthetic_weights must be floating point, of the shape and device of "
            f"synthetic_labels, got {describe(weights)} and synthetic_labels {describe(labels)}"
        )
    return check_rows_sum_to_one("synthetic_weights", weights)


def _check_ratio(ratio: object) -> None:
    if not callable(getattr(ratio, "sample", None)):
        raise TypeError(f"ratio must be a Grid, Beta or Constant, got {describe(ratio)}")
