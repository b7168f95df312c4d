"""Mixers of synthetic with real images, and of identities with each other."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

import synface_kernels as sk

from ...common.check import check_integers, check_number, describe
from .parts import (
    Mixed,
    Mixer,
    check_images,
    check_labels,
    check_ratio,
    check_rows_sum_to_one,
    exact_weights,
    paired_labels,
)
from .ratios import SYNFACE_GRID, Ratio, permutation, send, uniform


class MixedIdentities(NamedTuple):
    """Mixed identity coefficients (N, D), with targets and weights (N, 2) as in `Mixed`."""

    coefficients: Tensor
    targets: Tensor
    weights: Tensor


@dataclass(frozen=True)
class DomainMixup(Mixer):
    """Mixup of a synthetic batch with a real one: ψ·X_S + (1 − ψ)·X_R, with one label from each.

    Real label i becomes num_synthetic + i. The classifier has ``num_classes`` classes.

    Args:
        num_synthetic, num_real: identities in each domain, at least 1.
        ratio: the distribution of ψ; SynFace's grid by default.
        per_sample: draw a ψ for each image; SynFace draws one for the batch.
        flip: probability of flipping an image; each side of each pair is flipped independently.
        mean, std, dtype, memory_format, layout, impl: see `synface_kernels.domain_mixup`.

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
        check_integers(self, num_synthetic=1, num_real=1)
        check_number("flip", self.flip, 0, 1)

    @property
    def num_classes(self) -> int:
        """The number of classes of the classifier."""
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
        """Mix two batches.

        Args:
            synthetic: (N, H, W, C) images, or (N, C, H, W) with ``layout="NCHW"``; uint8 or
                floating point. real: (R, …), likewise. Image i is mixed with real image i mod R: a
                shorter real batch is repeated, a longer one is cut at N.
            synthetic_labels: (N,) integers in [0, num_synthetic); or (N, J), as identity mixup
                returns them, together with ``synthetic_weights`` (N, J), floating point, ≥ 0, each
                row summing to 1.
            real_labels: (R,) integers in [0, num_real). Labels may also be (N, 1) and (R, 1).
            out: receives the images; see `synface_kernels.domain_mixup`.

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
        """Draw a call's random numbers: ψ (B,) float64, and the images to flip, (2, B) or None.

        Use them to mix elsewhere, such as in workers by `synface_kernels.numpy.domain_mixup`.
        """
        psi = self._shares(batch, generator).expand(batch)
        return psi, uniform((2, batch), generator) < self.flip if self.flip > 0 else None

    def label(
        self, synthetic_labels: Tensor, real_labels: Tensor, psi: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return targets and weights (N, 2) of images mixed elsewhere, from labels and ψ (N,).

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
    """Mixup of each identity of a batch with another: φ·α + (1 − φ)·α', one φ for each image.

    The partners α' are the batch in a random order, so an identity may be its own partner.

    Args:
        ratio: the distribution of φ; SynFace's grid by default.

    Raises:
        TypeError: for a ratio of another type.

    Source: Qiu et al., "SynFace", ICCV 2021, eq. 2.
    """

    ratio: Ratio = SYNFACE_GRID

    def __post_init__(self) -> None:
        check_ratio(self.ratio)

    def __call__(
        self, alpha: Tensor, labels: Tensor, generator: Generator | None = None
    ) -> MixedIdentities:
        """Mix the coefficients of a batch.

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


def _cycled(rows: Tensor, count: int) -> Tensor:
    """Return `count` rows, of which row i is row i mod len(rows)."""
    if len(rows) >= count:
        return rows[:count]
    whole, rest = divmod(count, len(rows))
    return torch.cat([rows] * whole + [rows[:rest]])


def _own_weights(labels: Tensor, weights: Tensor | None) -> Tensor:
    """Return the weights of a synthetic image's labels before mixing, (N, J) float64."""
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
