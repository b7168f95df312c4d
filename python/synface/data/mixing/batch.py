"""Mixers of the images of one batch with each other: mixup and CutMix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from .parts import (
    Mixed,
    Mixer,
    check_images,
    check_labels,
    cutmix_boxes,
    image_size,
    paired_labels,
    paste,
    share_outside,
)
from .ratios import permutation, send


@dataclass(frozen=True, kw_only=True)
class _OneBatch(Mixer):
    """A mixer of a batch with itself.

    Attributes:
        partner: the images that the batch is mixed with: a random ``"permutation"`` of it, or the
            batch in ``"reverse"`` order.
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
        """Mix a batch.

        Args:
            images: (N, H, W, C), or (N, C, H, W) with ``layout="NCHW"``; uint8 or floating point.
                Any N.
            labels: (N,) or (N, 1) integers, ≥ 0.
            out: receives the images; see `synface_kernels.domain_mixup`.

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
        """Return the images mixed with images[order], and the shares (N,) of their own labels."""
        raise NotImplementedError

    def _partners(self, images: Tensor, generator: Generator | None) -> Tensor:
        if self.partner == "reverse":
            return torch.arange(len(images), device=images.device).flip(0)
        return send(permutation(len(images), generator), images.device)


@dataclass(frozen=True, kw_only=True)
class Mixup(_OneBatch):
    """Mixup of the images of a batch with one another: λ·X + (1 − λ)·X'.

    Args:
        ratio: the distribution of λ; ``Beta(a)`` is the paper's, a grid of 21 values the default.
        per_sample: draw a λ for each image, otherwise one for the batch.
        partner: ``"permutation"`` draws a partner for each image, ``"reverse"`` takes the batch in
            reverse order.
        mean, std, dtype, memory_format, layout, impl: see `synface_kernels.domain_mixup`.

    Memory above the inputs: the result, and a copy of the images in their own dtype.

    Raises:
        TypeError, ValueError: for a wrong argument, naming it.

    Source: Zhang et al., "mixup", ICLR 2018.
    """

    def _with(
        self, images: Tensor, order: Tensor, generator: Generator | None, out: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        share = send(self._shares(len(images), generator), images.device).expand(len(images))
        return self._mix(images, images.index_select(0, order), share, out), share


@dataclass(frozen=True, kw_only=True)
class CutMix(_OneBatch):
    """CutMix of the images of a batch: a box of another image is pasted into each.

    The box has √(1 − λ) of the image's height and of its width, each rounded down to an even number
    of pixels; its center is uniform over the pixels, and the box is clipped at the borders. An
    image's own label weighs exactly the share of its pixels outside the box.

    Args:
        ratio: the distribution of λ; ``Beta(1.0)`` is the paper's, a grid of 21 values the default.
        per_sample: draw λ and box for each image, otherwise once for the batch.
        partner: ``"permutation"`` draws a partner for each image, ``"reverse"`` takes the batch in
            reverse order.
        mean, std, dtype, memory_format, layout, impl: see `synface_kernels.domain_mixup`.

    Memory above the inputs: the result, and a copy of the images in their own dtype; on a GPU, or
    with gradients, two copies and a byte for each of their elements.

    Raises:
        TypeError, ValueError: for a wrong argument, naming it.

    Source: Yun et al., "CutMix", ICCV 2019.
    """

    def _with(
        self, images: Tensor, order: Tensor, generator: Generator | None, out: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        height, width = image_size(images, self.layout)
        boxes = cutmix_boxes(height, width, self._shares(len(images), generator), generator)
        share = send(share_outside(boxes, height, width), images.device).expand(len(images))
        boxes = send(boxes, images.device)
        pasted = paste(images, images, order, boxes, self.layout)
        return self._mix(pasted, pasted.detach(), torch.ones_like(share), out), share
