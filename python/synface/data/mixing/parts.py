"""Helpers of the mixers: CutMix boxes, weighted labels, and argument checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

import synface_kernels as sk

from ...common.check import check_bool, check_by_op, describe
from ...common.labels import labels_of
from .ratios import SYNFACE_GRID, Ratio, uniform

# ---- boxes: (4, count) int64: top, bottom, left, right; bottom and right are outside -------------


class Mixed(NamedTuple):
    """A mixed batch.

    Attributes:
        images: (N, C, H, W), normalized.
        targets: (N, K) int64 labels of each image; they may coincide.
        weights: (N, K) float32 share of each label, a multiple of 2⁻²⁴; a row sums to 1 exactly.
    """

    images: Tensor
    targets: Tensor
    weights: Tensor


@dataclass(frozen=True, kw_only=True)
class Mixer:
    """Base class of the mixers of images.

    Attributes:
        ratio: distribution of the shares: a `Grid`, a `Beta`, a `Constant`, or an object with
            their ``sample``.
        per_sample: draw a share for each image; otherwise one for the batch.
        mean, std, dtype, memory_format, layout, impl: see `synface_kernels.domain_mixup`.

    Raises:
        TypeError, ValueError: for a wrong argument, naming it.
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
        check_ratio(self.ratio)
        check_bool("per_sample", self.per_sample)
        images = meta_images(self.mean, self.std)
        share = torch.empty((), dtype=torch.float64, device="meta")
        check_by_op(lambda: self._mix(images, images, share, None))

    def _shares(self, batch: int, generator: Generator | None) -> Tensor:
        """Draw shares (B,), or (1,) for the whole batch; float64, on the generator's device."""
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


def cutmix_boxes(
    height: int, width: int, share: Tensor, generator: Generator | None, even: bool = True
) -> Tensor:
    """Draw CutMix's boxes: √(1 − λ) of the image's sides, around a uniform center, clipped.

    Sides are rounded down to a whole number of pixels, with ``even`` to an even one.
    """
    ratio = (1 - share).sqrt()
    spans = []
    for size, draw in zip((height, width), uniform((2, len(share)), generator), strict=True):
        side = (size * ratio).long()
        half = side // 2
        middle = (size * draw).long()
        end = middle + (half if even else side - half)
        spans += [(middle - half).clamp_min(0), end.clamp_max(size)]
    return torch.stack(spans)


def cutmix_boxes_within(
    height: int, width: int, limits: Sequence[float], count: int, generator: Generator | None
) -> Tensor:
    """Draw boxes inside the image, with sides uniform in [min, max) of the image's."""
    spans = []
    for size in (height, width):
        low, high = int(size * limits[0]), int(size * limits[1])
        side, draw = uniform((2, count), generator)
        length = low + (side * (high - low)).long()
        start = (draw * (size - length + 1)).long()
        spans += [start, start + length]
    return torch.stack(spans)


def share_outside(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return the share of an image's pixels outside its box, (count,) float64."""
    top, bottom, left, right = boxes
    pixels = max(height * width, 1)
    return (pixels - (bottom - top) * (right - left)).double() / pixels


def paste(images: Tensor, others: Tensor, order: Tensor, boxes: Tensor, layout: str) -> Tensor:
    """Return the images with others[order] inside the boxes (4, N), or (4, 1) for all."""
    if images.device.type == "cpu" and not images.requires_grad:  # copy the boxes' pixels alone
        pasted = images.clone()
        spans = boxes.expand(4, len(images)).T.tolist()
        for i, (other, (top, bottom, left, right)) in enumerate(
            zip(order.tolist(), spans, strict=True)
        ):
            rows, columns = slice(top, bottom), slice(left, right)
            box = (rows, columns) if layout == "NHWC" else (slice(None), rows, columns)
            pasted[i][box] = others[other][box]
        return pasted
    partner = others[order]
    height, width = image_size(images, layout)
    top, bottom, left, right = boxes[:, :, None, None]
    y = torch.arange(height, device=images.device)[:, None]
    x = torch.arange(width, device=images.device)
    rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)
    if layout == "NCHW":
        return torch.where((rows & columns).unsqueeze(1), partner, images)
    # Channels count as columns: loops over three elements would be slow.
    batch, channels = len(images), images.shape[3]
    inside = rows & columns.repeat_interleave(channels, 2)
    lines = (batch, height, width * channels)
    return torch.where(inside, partner.reshape(lines), images.reshape(lines)).view(images.shape)


# ---- labels --------------------------------------------------------------------------------------


def paired_labels(first: Tensor, second: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Return targets and weights (N, 2)."""
    return torch.stack([first, second], 1), exact_weights(torch.stack([share, 1 - share], 1))


def exact_weights(shares: Tensor) -> Tensor:
    """Round float64 shares (N, K) to float32 whose sums are 1 exactly.

    The partial sums are rounded to multiples of 2⁻²⁴, which float32 holds up to 1, as it holds
    their differences.
    """
    edges = torch.stack(list(accumulate(shares.unbind(1))), 1).mul(2**24).round()
    return edges.diff(prepend=torch.zeros_like(edges[:, :1])).div(2**24).float()


# ---- checks --------------------------------------------------------------------------------------


def check_layout(layout: object) -> None:
    if layout not in ("NHWC", "NCHW"):
        raise ValueError(f"layout must be 'NHWC' or 'NCHW', got {layout!r}")


def image_size(images: Tensor, layout: str) -> tuple[int, int]:
    """Return height and width."""
    height, width = images.shape[1:3] if layout == "NHWC" else images.shape[2:]
    return height, width


def memory_format_of(images: Tensor, layout: str) -> torch.memory_format:
    nchw = images.permute(0, 3, 1, 2) if layout == "NHWC" else images
    channels_last = nchw.is_contiguous(memory_format=torch.channels_last)
    last = channels_last and not nchw.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


CHANNELS = (1, 3, 4)  # grayscale, RGB, RGBA


def check_images(name: str, images: Tensor, layout: str) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"{name} must be a tensor, got {describe(images)}")
    if images.dim() != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        shape = "(N, H, W, C)" if layout == "NHWC" else "(N, C, H, W)"
        raise ValueError(
            f"{name} must be uint8 or floating point of shape {shape}, got {describe(images)}"
        )
    _, first, width, last = images.shape
    channels, elsewhere, other = (
        (last, first, "NCHW") if layout == "NHWC" else (first, last, "NHWC")
    )
    # Square feature maps of many channels are accepted in the given layout.
    if channels not in CHANNELS and elsewhere in CHANNELS and (layout == "NHWC" or width != last):
        raise ValueError(
            f"{name} of shape {tuple(images.shape)} would have {channels} channels in "
            f'layout="{layout}": give layout="{other}"'
        )


def check_labels(
    name: str, labels: Tensor, images: Tensor, count: int | None = None, several: bool = False
) -> Tensor:
    """Return integer labels in [0, count) as int64 (N,), or (N, J) where several are allowed.

    Other integers and, where only one is allowed, (N, 1) are converted.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a tensor, got {describe(labels)}")
    rows, device = len(images), images.device
    given = labels
    labels = labels_of(labels, keep_column=several)
    if (
        labels.dtype != torch.int64
        or labels.shape[:1] != (rows,)
        or not (labels.dim() == 1 or (several and labels.dim() == 2 and labels.shape[1]))
        or labels.device != device
    ):
        shape = "(N,) or (N, J)" if several else "(N,)"
        raise ValueError(
            f"{name} must be int64 of shape {shape} with N = {rows} on {device}, "
            f"got {describe(given)}"
        )
    valid = labels >= 0 if count is None else (labels >= 0) & (labels < count)
    bounds = "≥ 0" if count is None else f"in [0, {count})"
    require(valid, f"{name} must be {bounds}", labels)
    return labels


def check_rows_sum_to_one(name: str, rows: Tensor, advice: str = "") -> Tensor:
    """Return rows (N, K), whose sums must be 1 up to rounding, in float64 with sums of 1."""
    own = rows.detach().double()
    require((own >= 0) & own.isfinite(), f"{name} must be finite and ≥ 0", own)
    total = own.sum(1)
    close = (total - 1).abs() <= (2e-2 if rows.element_size() == 2 else 1e-4)
    require(close, f"each row of {name} must sum to 1{advice}", total)
    return own / total[:, None]


def require(condition: Tensor, message: str, values: Tensor) -> None:
    """Raise unless `condition` holds everywhere; on a GPU, an asynchronous assertion fails."""
    if condition.device.type != "cpu":
        torch._assert_async(condition.all(), message)
    elif not condition.all():
        where = tuple((~condition).nonzero()[0].tolist())
        raise ValueError(f"{message}, got {values[where].item()} in row {where[0]}")


def meta_images(mean: object, std: object) -> Tensor:
    """Return meta images, none of them, of as many channels as mean or std has numbers."""
    channels = next((len(each) for each in (mean, std) if isinstance(each, Sequence)), 3)
    return torch.empty((0, channels, channels, channels), dtype=torch.uint8, device="meta")


def check_ratio(ratio: object) -> None:
    if not callable(getattr(ratio, "sample", None)):
        raise TypeError(f"ratio must be a Grid, Beta or Constant, got {describe(ratio)}")
