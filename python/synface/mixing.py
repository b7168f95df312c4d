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
from itertools import accumulate
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Generator, Tensor

import synface_kernels as sk

from .check import check_integer, check_number, describe


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


# ---- how shares are distributed ------------------------------------------------------------------


class Ratio(Protocol):
    """A distribution of shares in [0, 1]."""

    def sample(self, count: int, generator: Generator | None = None) -> Tensor:
        """(count,) float64 independent draws, on the generator's device (None: CPU)."""
        ...


@dataclass(frozen=True)
class Grid:
    """Uniform over ``steps`` equidistant values from 0 to 1; SynFace's 0, 0.05, …, 1 by default.

    Raises:
        TypeError, ValueError: unless ``steps`` is an integer ≥ 2.
    """

    steps: int = 21

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, 2)

    def sample(self, count: int, generator: Generator | None = None) -> Tensor:
        check_integer("count", count, 0)
        drawn = torch.randint(self.steps, (count,), generator=generator, device=_device(generator))
        return drawn.double() / (self.steps - 1)


@dataclass(frozen=True)
class Beta:
    """Beta(a, b); b None is a.

    Raises:
        TypeError, ValueError: unless a and b are numbers in [1e-300, 1e300].

    Source: Zhang et al., "mixup", ICLR 2018, takes Beta(a, a).
    """

    a: float
    b: float | None = None

    def __post_init__(self) -> None:
        check_number("a", self.a, 1e-300, 1e300)
        if self.b is not None:
            check_number("b", self.b, 1e-300, 1e300)

    def sample(self, count: int, generator: Generator | None = None) -> Tensor:
        check_integer("count", count, 0)
        b = self.a if self.b is None else self.b
        shape = torch.tensor([[self.a], [b]], dtype=torch.float64).expand(2, count)
        shape = _send(shape, _device(generator))
        # Beta is G_a/(G_a + G_b) of two gamma variates, and G_a = G_(a+1)·U^(1/a): in logarithms,
        # because for small a both may be too small for a float.
        gamma = torch._standard_gamma(shape + 1, generator=generator)
        uniform = 1 - _uniform((2, count), generator)  # never 0
        first, second = gamma.log() + uniform.log() / shape
        return torch.sigmoid(first - second)


@dataclass(frozen=True)
class Constant:
    """Always ``value``.

    Raises:
        TypeError, ValueError: unless ``value`` is a number in [0, 1].
    """

    value: float

    def __post_init__(self) -> None:
        check_number("value", self.value, 0, 1)

    def sample(self, count: int, generator: Generator | None = None) -> Tensor:
        check_integer("count", count, 0)
        return torch.full(
            (count,), float(self.value), dtype=torch.float64, device=_device(generator)
        )


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

    ratio: Ratio = Grid()
    per_sample: bool = False
    mean: float | Sequence[float] = 0.5
    std: float | Sequence[float] = 0.5
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    layout: Literal["NHWC", "NCHW"] = "NHWC"
    impl: str = "auto"

    def __post_init__(self) -> None:
        _check_ratio(self.ratio)
        _check_layout(self.layout)

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
            synthetic_labels: (N,) int64 in [0, num_synthetic); or (N, J), as identity mixup
                returns them, together with ``synthetic_weights`` (N, J), floating point, ≥ 0, each
                row summing to 1.
            real_labels: (R,) int64 in [0, num_real).
            out: to write the images into; see `synface_kernels.domain_mixup`.

        Returns:
            `Mixed` with K = 2 labels per image, or J + 1: the synthetic ones with weight
            ψ·(their weight), and the real one with 1 − ψ.

        Differentiable in floating images. Memory above the inputs: the result; a copy of the real
        batch at N images, in its own dtype, if it is the shorter one.

        Raises:
            TypeError, ValueError: for a wrong argument, naming it.
        """
        _check_images("synthetic", synthetic, self.layout)
        _check_images("real", real, self.layout)
        batch, device = len(synthetic), synthetic.device
        if batch and not len(real):
            raise ValueError(f"real must hold at least one image, got {describe(real)}")
        _check_labels("real_labels", real_labels, real, self.num_real)
        _check_labels("synthetic_labels", synthetic_labels, synthetic, self.num_synthetic, True)
        own = _own_weights(synthetic_labels, synthetic_weights)

        shares, flips = self.draw(batch, generator)
        psi = _send(shares, device)
        flip = None if flips is None else _send(flips, device)
        images = self._mix(synthetic, _cycled(real, batch), psi, out, flip)
        return Mixed(images, *self._label(synthetic_labels, own, _cycled(real_labels, batch), psi))

    def draw(self, batch: int, generator: Generator | None = None) -> tuple[Tensor, Tensor | None]:
        """All that is random in a call: ψ (B,) float64; and which images to flip, (2, B) or None.

        For who mixes elsewhere, as workers do with `synface_kernels.numpy.domain_mixup`.
        """
        psi = self._shares(batch, generator).expand(batch)
        return psi, _uniform((2, batch), generator) < self.flip if self.flip > 0 else None

    def label(
        self, synthetic_labels: Tensor, real_labels: Tensor, psi: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Targets and weights (N, 2) of images mixed elsewhere, by (N,) labels and the ψ drawn.

        Raises:
            TypeError, ValueError: for wrong labels, naming them.
        """
        _check_labels("real_labels", real_labels, psi, self.num_real)
        _check_labels("synthetic_labels", synthetic_labels, psi, self.num_synthetic)
        return self._label(synthetic_labels, _own_weights(synthetic_labels, None), real_labels, psi)

    def _label(
        self, labels: Tensor, own: Tensor, real_labels: Tensor, psi: Tensor
    ) -> tuple[Tensor, Tensor]:
        others = real_labels + self.num_synthetic
        targets = torch.cat([labels.view(own.shape), others[:, None]], 1)
        shares = torch.cat([psi[:, None] * own, 1 - psi[:, None]], 1)
        return targets, _weights(shares)


@dataclass(frozen=True)
class IdentityMixup:
    """Mixes each identity of a batch with another: φ·α + (1 − φ)·α', one φ for each image.

    The partners α' are the batch in a random order, so an identity may meet itself.

    Args:
        ratio: the distribution of φ; SynFace's grid by default.

    Source: Qiu et al., "SynFace", ICCV 2021, eq. 2.
    """

    ratio: Ratio = Grid()

    def __post_init__(self) -> None:
        _check_ratio(self.ratio)

    def __call__(
        self, alpha: Tensor, labels: Tensor, generator: Generator | None = None
    ) -> MixedIdentities:
        """Mixes the coefficients of a batch.

        Args:
            alpha: (N, D) floating-point identity coefficients. labels: (N,) int64, ≥ 0.

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
        _check_labels("labels", labels, alpha)
        order = _send(_permutation(len(alpha), generator), alpha.device)
        phi = _send(self.ratio.sample(len(alpha), generator), alpha.device)
        return MixedIdentities(
            sk.identity_mixup(alpha, alpha[order], phi), *_pairs(labels, labels[order], phi)
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
            labels: (N,) int64, ≥ 0.
            out: to write the images into; see `synface_kernels.domain_mixup`.

        Returns:
            `Mixed` with K = 2 labels per image.

        Differentiable in floating images.

        Raises:
            TypeError, ValueError: for a wrong argument, naming it.
        """
        _check_images("images", images, self.layout)
        _check_labels("labels", labels, images)
        order = self._partners(images, generator)
        mixed, share = self._with(images, order, generator, out)
        return Mixed(mixed, *_pairs(labels, labels[order], share))

    def _with(
        self, images: Tensor, order: Tensor, generator: Generator | None, out: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The images mixed with their partners images[order], and the share (N,) of their own
        labels."""
        raise NotImplementedError

    def _partners(self, images: Tensor, generator: Generator | None) -> Tensor:
        if self.partner == "reverse":
            return torch.arange(len(images), device=images.device).flip(0)
        return _send(_permutation(len(images), generator), images.device)


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
        share = _send(self._shares(len(images), generator), images.device).expand(len(images))
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

    Memory above the inputs: the result, two copies of the images in their own dtype, and a byte
    for each of their elements.

    Source: Yun et al., "CutMix", ICCV 2019.
    """

    def _with(
        self, images: Tensor, order: Tensor, generator: Generator | None, out: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        height, width = _size(images, self.layout)
        boxes = _boxes(height, width, self._shares(len(images), generator), generator)
        share = _send(_kept(boxes, height, width), images.device).expand(len(images))
        boxes = _send(boxes, images.device)
        pasted = _paste(images, images.index_select(0, order), boxes, self.layout)
        return self._mix(pasted, pasted.detach(), torch.ones_like(share), out), share


class TimmMixup:
    """Takes the place of `timm.data.Mixup`: ``x, target = mixup_fn(x, target)``.

    Each image is mixed with its mirror image in the order of the batch, i with B − 1 − i.

    Args:
        mixup_alpha, cutmix_alpha: λ ~ Beta(alpha, alpha); 0 turns that method off.
        cutmix_minmax: bounds (min, max) of a box's sides as shares of the image's: boxes are drawn
            from these instead, anywhere in the image, and cutmix_alpha counts as 1.
        prob: probability of mixing at all; switch_prob: of CutMix, where both are on.
        mode: what gets draws of its own: the ``"batch"``, each ``"pair"`` (i, B − 1 − i), or each
            image (``"elem"``).
        correct_lam: weigh labels by the pixels kept, not by the λ that was drawn (always so with
            cutmix_minmax).
        label_smoothing: of dense targets; with sparse ones, give it to the loss.
        num_classes: C, at least 1.
        dense: return targets as (B, C) float32 instead of (targets, weights).
        mean, std: the result is (mixture − mean)/std, with bytes standing for value/255.
        dtype: of the result; None keeps that of a floating x, and is float32 for uint8.
        memory_format: of the result; None keeps that of x.
        layout: of x, ``"NCHW"`` or ``"NHWC"``; the result is (B, C, H, W).
        impl: as in `synface_kernels.domain_mixup`.

    Attributes:
        mixup_enabled: set it to False to mix no more (x is still normalised).

    Different from timm's: targets are sparse unless ``dense``; a batch may be odd (its middle image
    meets itself) or have one image; x may be uint8; x is not written to; numbers are drawn from a
    `torch.Generator`, not from NumPy's global state; pixels and λ are computed in float64 and
    rounded once; dense targets are float32 whatever x is.

    Raises:
        TypeError, ValueError: for a wrong argument, naming it.
    """

    def __init__(
        self,
        mixup_alpha: float = 1.0,
        cutmix_alpha: float = 0.0,
        cutmix_minmax: Sequence[float] | None = None,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: Literal["batch", "pair", "elem"] = "batch",
        correct_lam: bool = True,
        label_smoothing: float = 0.0,
        num_classes: int = 0,
        *,
        dense: bool = False,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format | None = None,
        layout: Literal["NHWC", "NCHW"] = "NCHW",
        impl: str = "auto",
    ) -> None:
        check_number("mixup_alpha", mixup_alpha, 0)
        check_number("cutmix_alpha", cutmix_alpha, 0)
        if cutmix_minmax is not None:
            if not isinstance(cutmix_minmax, Sequence) or not all(
                isinstance(bound, (int, float)) for bound in cutmix_minmax
            ):
                raise TypeError(
                    "cutmix_minmax must be a sequence of two numbers (min, max), "
                    f"got {describe(cutmix_minmax)}"
                )
            if len(cutmix_minmax) != 2 or not 0 <= cutmix_minmax[0] <= cutmix_minmax[1] <= 1:
                raise ValueError(
                    "cutmix_minmax must be (min, max) with 0 ≤ min ≤ max ≤ 1, "
                    f"got {cutmix_minmax!r}"
                )
            cutmix_alpha = 1.0
        if not mixup_alpha and not cutmix_alpha:
            raise ValueError("mixup_alpha or cutmix_alpha must be > 0, or cutmix_minmax given")
        check_number("prob", prob, 0, 1)
        check_number("switch_prob", switch_prob, 0, 1)
        if mode not in ("batch", "pair", "elem"):
            raise ValueError(f"mode must be 'batch', 'pair' or 'elem', got {mode!r}")
        check_number("label_smoothing", label_smoothing, 0, 1)
        if label_smoothing and not dense:
            raise ValueError(
                f"label_smoothing = {label_smoothing} needs dense=True: it gives every class a "
                "weight; with sparse targets, give it to the loss"
            )
        check_integer("num_classes", num_classes, 1)
        _check_layout(layout)
        self.mixup = Beta(mixup_alpha) if mixup_alpha else None
        self.cutmix = Beta(cutmix_alpha) if cutmix_alpha else None
        self.cutmix_minmax = cutmix_minmax
        self.prob = prob
        self.switch_prob = switch_prob
        self.mode = mode
        self.correct_lam = correct_lam
        self.label_smoothing = label_smoothing
        self.num_classes = num_classes
        self.dense = dense
        self.mean = mean
        self.std = std
        self.dtype = dtype
        self.memory_format = memory_format
        self.layout: Literal["NHWC", "NCHW"] = layout
        self.impl = impl
        self.mixup_enabled = True

    def __call__(
        self, x: Tensor, target: Tensor, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
        """Mixes a batch.

        Args:
            x: (B, C, H, W) uint8 or floating images, or (B, H, W, C) with ``layout="NHWC"``.
            target: (B,) int64 labels in [0, num_classes).

        Returns:
            The images, a new tensor, and (targets (B, 2) int64, weights (B, 2) float32), or with
            ``dense`` (B, C) float32: (1 − ε)·Σ_k weight_k·onehot(target_k) + ε/C, with ε =
            label_smoothing.

        Memory above the inputs: the result, a copy of x in its own dtype, and as much again plus a
        byte for each of its elements where CutMix is on.

        Raises:
            TypeError, ValueError: for a wrong argument, naming it.
        """
        _check_images("x", x, self.layout)
        _check_labels("target", target, x, self.num_classes)
        batch = len(x)
        psi, share, boxes = self._draw(batch, *_size(x, self.layout), generator)
        psi, share = (_send(s, x.device).expand(batch) for s in (psi, share))
        partner = x.flip(0)
        pasted = x if boxes is None else _paste(x, partner, _send(boxes, x.device), self.layout)
        images = sk.domain_mixup(
            pasted, partner, psi, mean=self.mean, std=self.std, layout=self.layout,
            dtype=self.dtype or (x.dtype if x.is_floating_point() else torch.float32),
            memory_format=self.memory_format or _memory_format(x, self.layout), impl=self.impl,
        )  # fmt: skip
        targets, weights = _pairs(target, target.flip(0), share)
        if not self.dense:
            return images, (targets, weights)
        smoothing = self.label_smoothing
        full = weights.new_full((batch, self.num_classes), smoothing / self.num_classes)
        for k in (0, 1):  # one after the other: their sum is the same bits on every device
            full.scatter_add_(1, targets[:, k : k + 1], (1 - smoothing) * weights[:, k : k + 1])
        return images, full

    def _draw(
        self, batch: int, height: int, width: int, generator: Generator | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Shares of the pixels outside the box and of the label, (1,) or (B,); boxes (4, same)."""
        count = {"batch": 1, "pair": (batch + 1) // 2, "elem": batch}[self.mode]
        chance = _uniform((2, count), generator)
        mixes = chance[0] < (self.prob if self.mixup_enabled else 0.0)
        one = torch.ones_like(chance[0])
        label = pixel = one
        if self.mixup is not None:
            label = pixel = torch.where(mixes, self.mixup.sample(count, generator), one)
        boxes = None
        if self.cutmix is not None:
            cuts = mixes & (chance[1] < (self.switch_prob if self.mixup is not None else 1.0))
            kept = self.cutmix.sample(count, generator)
            if self.cutmix_minmax is None:
                boxes = _boxes(height, width, kept, generator)
            else:
                boxes = _boxes_within(height, width, self.cutmix_minmax, count, generator)
            boxes = torch.where(cuts, boxes, 0)
            if self.correct_lam or self.cutmix_minmax is not None:
                kept = _kept(boxes, height, width)
            label, pixel = torch.where(cuts, kept, label), torch.where(cuts, one, pixel)
        if self.mode == "pair":
            image = torch.arange(batch, device=label.device)
            pair = torch.minimum(image, image.flip(0))
            label, pixel = label[pair], pixel[pair]
            boxes = None if boxes is None else boxes[:, pair]
        return pixel, label, boxes


# ---- draws ---------------------------------------------------------------------------------------


def _device(generator: Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device


def _send(drawn: Tensor, device: torch.device) -> Tensor:
    return drawn.to(device, non_blocking=device.type != "cpu")


def _uniform(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    """float64 in [0, 1)."""
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=_device(generator))


def _permutation(count: int, generator: Generator | None) -> Tensor:
    return torch.randperm(count, generator=generator, device=_device(generator))


# ---- boxes: (4, count) int64: top, bottom, left, right; bottom and right are outside -------------


def _boxes(height: int, width: int, share: Tensor, generator: Generator | None) -> Tensor:
    """CutMix's: sides √(1 − λ) of the image's, round a uniform centre, cut off at the borders."""
    ratio = (1 - share).sqrt()
    spans = []
    for size, draw in zip((height, width), _uniform((2, len(share)), generator), strict=True):
        half = (size * ratio).long() // 2
        middle = (size * draw).long()
        spans += [(middle - half).clamp_min(0), (middle + half).clamp_max(size)]
    return torch.stack(spans)


def _boxes_within(
    height: int, width: int, limits: Sequence[float], count: int, generator: Generator | None
) -> Tensor:
    """Sides uniform between two shares of the image's, the upper left out; wholly inside it."""
    spans = []
    for size in (height, width):
        low, high = int(size * limits[0]), int(size * limits[1])
        side, draw = _uniform((2, count), generator)
        length = low + (side * (high - low)).long()
        start = (draw * (size - length)).long()
        spans += [start, start + length]
    return torch.stack(spans)


def _kept(boxes: Tensor, height: int, width: int) -> Tensor:
    """The share of an image's pixels outside its box, (count,) float64."""
    top, bottom, left, right = boxes
    pixels = max(height * width, 1)
    return (pixels - (bottom - top) * (right - left)).double() / pixels


def _paste(images: Tensor, partner: Tensor, boxes: Tensor, layout: str) -> Tensor:
    """The images with their partners' pixels inside the boxes (4, N), or (4, 1) for one box."""
    height, width = _size(images, layout)
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


def _pairs(first: Tensor, second: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Targets and weights (N, 2)."""
    return torch.stack([first, second], 1), _weights(torch.stack([share, 1 - share], 1))


def _weights(shares: Tensor) -> Tensor:
    """Float64 shares (N, K) as float32 whose sums are 1 exactly.

    Rounded are the partial sums, to multiples of 2⁻²⁴: float32 holds those up to 1, and their
    differences.
    """
    edges = torch.stack(list(accumulate(shares.unbind(1))), 1).mul(2**24).round()
    return edges.diff(prepend=torch.zeros_like(edges[:, :1])).div(2**24).float()


def _cycled(rows: Tensor, count: int) -> Tensor:
    """Row i of the result is row i mod len(rows)."""
    if len(rows) >= count:
        return rows[:count]
    whole, rest = divmod(count, len(rows))
    return torch.cat([rows] * whole + [rows[:rest]])


def _own_weights(labels: Tensor, weights: Tensor | None) -> Tensor:
    """What each label of a synthetic image weighs before it is mixed, (N, J) float64."""
    if labels.dim() == 1:
        if weights is not None:
            raise ValueError("synthetic_weights must be None with (N,) synthetic_labels")
        return torch.ones(len(labels), 1, dtype=torch.float64, device=labels.device)
    if weights is None:
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
    own = weights.detach().double()
    _require((own >= 0) & own.isfinite(), "synthetic_weights must be finite and ≥ 0", own)
    total = own.sum(1)
    close = (total - 1).abs() <= (2e-2 if weights.element_size() == 2 else 1e-4)
    _require(close, "each row of synthetic_weights must sum to 1", total)
    return own / total[:, None]


# ---- checks --------------------------------------------------------------------------------------


def _check_ratio(ratio: object) -> None:
    if not callable(getattr(ratio, "sample", None)):
        raise TypeError(f"ratio must be a Grid, Beta or Constant, got {describe(ratio)}")


def _check_layout(layout: object) -> None:
    if layout not in ("NHWC", "NCHW"):
        raise ValueError(f"layout must be 'NHWC' or 'NCHW', got {layout!r}")


def _size(images: Tensor, layout: str) -> tuple[int, int]:
    """Height and width."""
    height, width = images.shape[1:3] if layout == "NHWC" else images.shape[2:]
    return height, width


def _memory_format(images: Tensor, layout: str) -> torch.memory_format:
    nchw = images.permute(0, 3, 1, 2) if layout == "NHWC" else images
    channels_last = nchw.is_contiguous(memory_format=torch.channels_last)
    last = channels_last and not nchw.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _check_images(name: str, images: Tensor, layout: str) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"{name} must be a tensor, got {describe(images)}")
    if images.dim() != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        shape = "(N, H, W, C)" if layout == "NHWC" else "(N, C, H, W)"
        raise ValueError(
            f"{name} must be uint8 or floating point of shape {shape}, got {describe(images)}"
        )


def _check_labels(
    name: str, labels: Tensor, images: Tensor, count: int | None = None, several: bool = False
) -> None:
    """int64 (N,), or where several are allowed (N, J), in [0, count)."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a tensor, got {describe(labels)}")
    rows, device = len(images), images.device
    if (
        labels.dtype != torch.int64
        or labels.shape[:1] != (rows,)
        or not (labels.dim() == 1 or (several and labels.dim() == 2 and labels.shape[1]))
        or labels.device != device
    ):
        shape = "(N,) or (N, J)" if several else "(N,)"
        raise ValueError(
            f"{name} must be int64 of shape {shape} with N = {rows} on {device}, "
            f"got {describe(labels)}"
        )
    valid = labels >= 0 if count is None else (labels >= 0) & (labels < count)
    bounds = "≥ 0" if count is None else f"in [0, {count})"
    _require(valid, f"{name} must be {bounds}", labels)


def _require(condition: Tensor, message: str, values: Tensor) -> None:
    """At once, naming what came, on a CPU; without waiting, on a GPU."""
    if condition.device.type != "cpu":
        torch._assert_async(condition.all(), message)
    elif not condition.all():
        where = tuple((~condition).nonzero()[0].tolist())
        raise ValueError(f"{message}, got {values[where].item()} in row {where[0]}")
