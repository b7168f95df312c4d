"""timm's mixup and CutMix: drop-in replacements of `timm.data`'s `Mixup` and `FastCollateMixup`.

Replace ``from timm.data import Mixup`` by ``from synface.data.mixing.timm_mixup import Mixup``:
arguments, their defaults, attributes, results and distributions are timm's (1.0.31). With
``sparse=True`` targets have the form that `synface_kernels.margin_cross_entropy` takes, without a
(B, C) matrix.

Different from timm's: a batch may be odd (its middle image is mixed with itself) or have one image;
input images are never written to; wrong arguments are errors; numbers are drawn from a
`torch.Generator`, not from NumPy's global state; pixels and λ are computed in float64 and rounded
once; dense targets are float32 for images of any dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import default_collate

import synface_kernels as sk

from ...common.check import check_by_op, check_integer, check_number, describe
from .parts import (
    check_images,
    check_labels,
    check_layout,
    check_rows_sum_to_one,
    cutmix_boxes,
    cutmix_boxes_within,
    exact_weights,
    image_size,
    memory_format_of,
    meta_images,
    paired_labels,
    paste,
    share_outside,
)
from .ratios import Beta, send, uniform

__all__ = ["FastCollateMixup", "Mixup"]
Targets: TypeAlias = "Tensor | tuple[Tensor, Tensor]"


@dataclass(eq=False)
class _TimmCall:
    """Base class of timm's two callables: arguments, draws and targets.

    Image i is mixed with image B − 1 − i of the batch. All arguments are attributes of these names,
    read at each call, and may be set between calls.
    """

    mixup_alpha: float = 1.0
    cutmix_alpha: float = 0.0
    cutmix_minmax: Sequence[float] | None = None
    prob: float = 1.0
    switch_prob: float = 0.5
    mode: Literal["batch", "pair", "elem", "half"] = "batch"
    correct_lam: bool = True
    label_smoothing: float = 0.1
    num_classes: int = 1000
    multi_label: bool = False
    _: KW_ONLY
    sparse: bool = False
    mixup_enabled: bool = field(default=True, init=False)

    _MODES: ClassVar[tuple[str, ...]] = ("batch", "pair", "elem")
    _EVEN_BOXES: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.cutmix_minmax is not None:
            self.cutmix_alpha = 1.0
        self._check_arguments()

    def _check_arguments(self) -> None:
        """Raise for a wrong argument; every call checks anew, since attributes may be set."""
        check_number("mixup_alpha", self.mixup_alpha, 0)
        check_number("cutmix_alpha", self.cutmix_alpha, 0)
        minmax = self.cutmix_minmax
        if minmax is not None:
            if not isinstance(minmax, Sequence) or not all(
                isinstance(bound, (int, float)) for bound in minmax
            ):
                raise TypeError(
                    "cutmix_minmax must be a sequence of two numbers (min, max), "
                    f"got {describe(minmax)}"
                )
            if len(minmax) != 2 or not 0 <= minmax[0] <= minmax[1] <= 1:
                raise ValueError(
                    f"cutmix_minmax must be (min, max) with 0 ≤ min ≤ max ≤ 1, got {minmax!r}"
                )
        if self.mixup_enabled and not self.mixup_alpha and not self.cutmix_alpha:
            raise ValueError("mixup_alpha or cutmix_alpha must be > 0, or cutmix_minmax given")
        check_number("prob", self.prob, 0, 1)
        check_number("switch_prob", self.switch_prob, 0, 1)
        if self.mode not in self._MODES:
            *names, last = map(repr, self._MODES)
            raise ValueError(f"mode must be {', '.join(names)} or {last}, got {self.mode!r}")
        check_number("label_smoothing", self.label_smoothing, 0, 1)
        check_integer("num_classes", self.num_classes, 1)
        if self.sparse and self.multi_label:
            raise ValueError("multi_label=True needs dense targets: leave sparse=False")

    @property
    def mix_prob(self) -> float:
        """The probability of mixing at all: timm's name of `prob`."""
        return self.prob

    @mix_prob.setter
    def mix_prob(self, prob: float) -> None:
        self.prob = prob

    def _draw(
        self, batch: int, height: int, width: int, generator: Generator | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Draw shares of pixels (outside boxes) and labels, (1,) or (rows,), and boxes (4, same).

        Rows are the images of the result: half of the batch in mode "half".
        """
        pairs = (batch + 1) // 2
        count = {"batch": 1, "pair": pairs, "elem": batch, "half": pairs}[self.mode]
        chance = uniform((2, count), generator)
        mixes = chance[0] < (self.prob if self.mixup_enabled else 0.0)
        one = torch.ones_like(chance[0])
        label = pixel = one
        if self.mixup_alpha:
            drawn = Beta(self.mixup_alpha).sample(count, generator)
            label = pixel = torch.where(mixes, drawn, one)
        boxes = None
        if self.cutmix_alpha:
            cuts = mixes & (chance[1] < (self.switch_prob if self.mixup_alpha else 1.0))
            outside = Beta(self.cutmix_alpha).sample(count, generator)
            if self.cutmix_minmax is None:
                boxes = cutmix_boxes(height, width, outside, generator, self._EVEN_BOXES)
            else:
                boxes = cutmix_boxes_within(height, width, self.cutmix_minmax, count, generator)
            boxes = torch.where(cuts, boxes, 0)
            if self.correct_lam or self.cutmix_minmax is not None:
                outside = share_outside(boxes, height, width)
            label, pixel = torch.where(cuts, outside, label), torch.where(cuts, one, pixel)
        if self.mode == "pair":
            image = torch.arange(batch, device=label.device)
            pair = torch.minimum(image, image.flip(0))
            label, pixel = label[pair], pixel[pair]
            boxes = None if boxes is None else boxes[:, pair]
        return pixel, label, boxes

    def _paste(self, images: Tensor, x: Tensor, boxes: Tensor | None, layout: str) -> Tensor:
        """Return the first images of x, with boxes of their partners, x in reverse, pasted."""
        if boxes is None:
            return images
        order = torch.arange(len(x), device=x.device).flip(0)[: len(images)]
        return paste(images, x, order, send(boxes, x.device), layout)

    def _label(self, target: Tensor, share: Tensor) -> Targets:
        """Return targets from checked labels, hard or soft, and shares (rows,) of own labels."""
        rows, classes, smoothing = len(share), self.num_classes, self.label_smoothing
        first, second = target[:rows], target.flip(0)[:rows]
        if target.dim() == 2:
            weights = exact_weights(torch.stack([share, 1 - share], 1))
            level = 0.5 if self.multi_label else 1 / classes
            mixed = weights[:, :1] * first + weights[:, 1:] * second
            return (1 - smoothing) * mixed + smoothing * level
        targets, weights = paired_labels(first, second, share)
        if self.sparse:
            return targets, weights
        full = weights.new_full((rows, classes), smoothing / classes)
        for k in (0, 1):  # one after the other: their sum is the same bits on every device
            full.scatter_add_(1, targets[:, k : k + 1], (1 - smoothing) * weights[:, k : k + 1])
        return full

    def _check_target(self, target: Tensor, images: Tensor) -> Tensor:
        """Return labels as (B,) int64, or soft labels as (B, C) float32."""
        soft = isinstance(target, Tensor) and (target.is_floating_point() or self.multi_label)
        if not soft:
            return check_labels("target", target, images, self.num_classes)
        shape = (len(images), self.num_classes)
        if self.sparse or target.shape != shape or target.device != images.device:
            wanted = f"soft labels of shape (N, C) = {shape} on {images.device}"
            if not self.multi_label:
                wanted = f"int64 of shape (N,) or {wanted}"
            if self.sparse:
                wanted = f"int64 of shape (N,) with N = {len(images)} where sparse=True"
            raise ValueError(f"target must be {wanted}, got {describe(target)}")
        if not self.multi_label:
            check_rows_sum_to_one(
                "target", target, "; labels that each may be 1 need multi_label=True"
            )
        return target.float()


@dataclass(eq=False)
class Mixup(_TimmCall):
    """A replacement of `timm.data.Mixup`: ``x, target = mixup_fn(x, target)``.

    Image i is mixed with image B − 1 − i of the batch. All arguments are attributes of the same
    names, read at each call, and may be set between calls.

    Args:
        mixup_alpha, cutmix_alpha: λ ~ Beta(alpha, alpha); 0 turns that method off.
        cutmix_minmax: bounds (min, max) of a box's sides as shares of the image's: boxes are drawn
            from these instead, anywhere in the image, and cutmix_alpha counts as 1.
        prob: probability of mixing at all; switch_prob: of CutMix, where both are on.
        mode: numbers are drawn once for the ``"batch"``, for each ``"pair"`` (i, B − 1 − i), or for
            each image (``"elem"``).
        correct_lam: weigh labels by the pixels outside the box, not by the drawn λ (always so with
            cutmix_minmax).
        label_smoothing: ε of dense targets; it is not applied with ``sparse=True``, so give it to
            the loss.
        num_classes: C, at least 1.
        multi_label: targets are (B, C) labels that each may be 1, and are smoothed towards 0.5.
        sparse: return (targets, weights) instead of dense targets.
        mean, std: the result is (mixture − mean)/std, with bytes standing for value/255.
        dtype: of the result; None keeps that of a floating x, and is float32 for uint8.
        memory_format: of the result; None keeps that of x.
        layout: of x, ``"NCHW"`` or ``"NHWC"``; the result is (B, C, H, W).
        impl: as in `synface_kernels.domain_mixup`.

    Attributes:
        mixup_enabled: False turns mixing off (x is still normalized).
        mix_prob: timm's name of ``prob``.

    Raises:
        TypeError, ValueError: for a wrong argument, naming it.
    """

    _: KW_ONLY
    mean: float | Sequence[float] = 0.0
    std: float | Sequence[float] = 1.0
    dtype: torch.dtype | None = None
    memory_format: torch.memory_format | None = None
    layout: Literal["NHWC", "NCHW"] = "NCHW"
    impl: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        images = meta_images(self.mean, self.std)
        check_by_op(
            lambda: sk.domain_mixup(
                images, images, 0.5, mean=self.mean, std=self.std,
                dtype=torch.float32 if self.dtype is None else self.dtype,
                memory_format=self.memory_format or torch.contiguous_format,
                layout=self.layout, impl=self.impl,
            )
        )  # fmt: skip

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_layout(self.layout)

    def __call__(
        self, x: Tensor, target: Tensor, generator: Generator | None = None
    ) -> tuple[Tensor, Targets]:
        """Mix a batch.

        Args:
            x: (B, C, H, W) uint8 or floating images, or (B, H, W, C) with ``layout="NHWC"``.
            target: (B,) or (B, 1) integer labels in [0, num_classes); or (B, num_classes) soft
                labels, floating point, ≥ 0, each row summing to 1 (with ``multi_label`` of any
                dtype and values).

        Returns:
            The images, a new tensor, and (B, num_classes) float32 targets: with y(i) the one-hot or
            soft label of image i and λ its share, (1 − ε)·(λ·y(i) + (1 − λ)·y(B − 1 − i)) + ε/C, or
            + ε/2 with ``multi_label``. With ``sparse``, targets are instead
            (targets (B, 2) int64, weights (B, 2) float32).

        Memory above the inputs: the result, a copy of x in its own dtype, and one more where CutMix
        is on; on a GPU, or with gradients, CutMix takes a third copy and a byte for each element.

        Raises:
            TypeError, ValueError: for a wrong argument, naming it.
        """
        self._check_arguments()
        check_images("x", x, self.layout)
        target = self._check_target(target, x)
        batch = len(x)
        pixel, share, boxes = self._draw(batch, *image_size(x, self.layout), generator)
        mixed = self._paste(x, x, boxes, self.layout)
        labels = self._label(target, send(share, x.device).expand(batch))
        dtype = self.dtype or (x.dtype if x.is_floating_point() else torch.float32)
        memory_format = self.memory_format or memory_format_of(x, self.layout)
        blends = _blends(pixel)
        if (
            not blends
            and dtype.is_floating_point  # else `domain_mixup` raises
            and (self.mean, self.std, self.layout, self.impl) == (0.0, 1.0, "NCHW", "auto")
            and mixed.dtype == dtype
            and mixed.is_contiguous(memory_format=memory_format)
        ):
            return (x.clone() if mixed is x else mixed), labels
        images = sk.domain_mixup(
            mixed, x.flip(0) if blends else mixed.detach(),
            send(pixel, x.device).expand(batch), mean=self.mean, std=self.std,
            layout=self.layout, dtype=dtype, memory_format=memory_format, impl=self.impl,
        )  # fmt: skip
        return images, labels


@dataclass(eq=False)
class FastCollateMixup(_TimmCall):
    """A replacement of `timm.data.FastCollateMixup`: the ``collate_fn`` of a `DataLoader`.

    All arguments but ``mode`` are as in `Mixup`.

    Args:
        mode: ``"batch"``, ``"pair"`` or ``"elem"``, see `Mixup`; or ``"half"``, which makes
            one image of each pair (i, B − 1 − i), with its own draws: (B + 1)//2 images.

    Attributes:
        mixup_enabled: False turns mixing off; mode "half" still halves the batch.
        mix_prob: timm's name of ``prob``.

    Raises:
        TypeError, ValueError: for a wrong argument, naming it.
    """

    _MODES: ClassVar[tuple[str, ...]] = ("batch", "pair", "elem", "half")

    def __call__(
        self, batch: Sequence[Any], _: object = None, *, generator: Generator | None = None
    ) -> tuple[Tensor, Targets]:
        """Mix the items of a batch.

        Args:
            batch: pairs (image, label); further entries of an item are ignored. Images are uint8
                (C, H, W), all NumPy arrays or all tensors of the CPU; labels are integers, or soft
                labels (num_classes,), as for `Mixup`.
            generator: None is torch's global one of the CPU, which `DataLoader` seeds differently
                in each of its workers.

        Returns:
            (B, C, H, W) uint8 images, rounded to the nearest, and targets as `Mixup` returns them;
            with ``mode="half"`` (B + 1)//2 of both.

        Memory above the inputs: the result, and up to 8 bytes for each of the images' bytes.

        Raises:
            TypeError, ValueError: for a wrong argument, naming it.
        """
        self._check_arguments()
        if not batch:
            raise ValueError("batch must hold at least one pair (image, label), got none")
        x = _stacked([item[0] for item in batch])
        with torch.device("cpu"):  # whatever torch's default device is
            labels = default_collate([item[1] for item in batch])
        target = self._check_target(labels, x)
        pixel, share, boxes = self._draw(len(x), *image_size(x, "NCHW"), generator)
        rows = (len(x) + 1) // 2 if self.mode == "half" else len(x)
        pixel, share = (send(s, x.device).expand(rows) for s in (pixel, share))
        images = self._paste(x[:rows], x, boxes, "NCHW")
        if _blends(pixel):
            images = sk.domain_mixup(
                images, x[len(x) - rows :].flip(0), pixel, mean=0.0, std=1 / 255, layout="NCHW"
            ).round_().to(torch.uint8)  # fmt: skip
        return images, self._label(target, share)


@dataclass(eq=False)
class TimmMixup(Mixup):
    """`Mixup` with other defaults: sparse targets unless ``dense``, and no smoothing.

    Calls are those of `Mixup`. CutMix boxes have even sides, as in timm's earlier versions.

    Args:
        dense: return targets as (B, C) float32 instead of (targets, weights).
        label_smoothing: of dense targets; with sparse ones, give it to the loss.
        num_classes: C, at least 1; required.

    Raises:
        TypeError, ValueError: for a wrong argument, naming it.
    """

    label_smoothing: float = 0.0
    num_classes: int = 0
    _: KW_ONLY
    dense: bool = False
    sparse: bool = field(default=True, init=False)

    _EVEN_BOXES: ClassVar[bool] = True

    def _check_arguments(self) -> None:
        self.sparse = not self.dense
        super()._check_arguments()
        if self.label_smoothing and self.sparse:
            raise ValueError(
                f"label_smoothing = {self.label_smoothing} needs dense=True: it gives every class "
                "a weight; with sparse targets, give it to the loss. "
                "synface.data.mixing.timm_mixup.Mixup has timm's defaults"
            )


def _blends(pixel: Tensor) -> bool:
    """Return whether any image is blended; True on a GPU, which is not synchronized with."""
    return pixel.device.type != "cpu" or not bool((pixel == 1).all())


def _stacked(images: Sequence[Any]) -> Tensor:
    """Stack uint8 images (C, H, W), all arrays or all tensors, to one tensor (B, C, H, W)."""
    first = images[0]
    if not isinstance(first, (np.ndarray, Tensor)):
        raise TypeError(f"images must be NumPy arrays or tensors, got {describe(first)}")
    kind = np.ndarray if isinstance(first, np.ndarray) else Tensor
    byte = np.uint8 if kind is np.ndarray else torch.uint8
    for i, image in enumerate(images):
        if not isinstance(image, kind):
            raise TypeError(f"image {i} must be a {kind.__name__} as image 0 is, got {type(image)}")
        if image.dtype != byte or image.ndim != 3 or image.shape != first.shape:
            raise ValueError(
                "images must be uint8 (C, H, W) of one shape, got "
                f"{image.dtype} {tuple(image.shape)} for image {i}, and {tuple(first.shape)} for "
                "image 0"
            )
    if kind is Tensor:
        return torch.stack(list(images))
    return torch.from_numpy(np.stack(images))  # from_numpy would warn for read-only arrays
