"""insightface's ``PartialFC_V2``, by its constructor and call, over this library's op."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

import synface_kernels as sk

from ..check import check_integer, check_number, describe


class PartialFC(nn.Module):
    """The class centres, of which each step takes a random part: insightface's ``PartialFC_V2``.

    Works with no process group too, on a CPU, with batches of any size, and with any optimiser.

    Args:
        margin_loss: a margin of this library (`synface_kernels.ArcFace`, …), or an object with the
            attributes of insightface's ``CombinedMarginLoss`` (``s``, ``m1``, ``m2``, ``m3``,
            ``interclass_filtering_threshold``), ``ArcFace`` (``s``, ``margin``) or ``CosFace``
            (``s``, ``m``): its numbers are read, it is not called. Angles are in radians.
        embedding_size: D. num_classes: C, over all ranks.
        sample_rate: in (0, 1]: below 1, each step takes this share of the classes, with every
            positive among them.
        fp16: accepted, and changes nothing: embeddings are taken in the dtype in which they come
            (autocast's, for example), and sums are float32. For 16-bit centres give ``dtype``.
        convention: what an object of insightface's means:

            - ``"synface"``: its numbers, as this library's margins have them: the true gradient,
              cos θ continued monotonically past π, and all of m1, m2 and m3.
            - ``"insightface"``: what its code computes (since 2022): the margin's slope is taken as
              1, cosines rise again past π, and m1 and m2 count for nothing where m3 > 0.
        sparse: whether the centres' gradient of a sampled step is a sparse tensor (COO, of S rows),
            for `synface.optim`'s optimisers, `torch.optim.SparseAdam`, or `torch.optim.SGD` without
            weight decay. False: a dense one, for any optimiser, which costs C·D at each step.
        generator: draws the classes. Default: torch's own of the labels' device.
        impl: which implementation of the op to take. device, dtype: of the centres.

    State dict: ``weight`` (C, D), like theirs; centres start as normal numbers of deviation 0.01.

    Labels that are no class of any rank are an error (theirs costs 69.0776, silently); rows of
    label -100 are left out.

    Memory: C·D values; a sampled step reads its S rows where they lie, and returns S rows of
    gradient. See `synface_kernels.margin_cross_entropy` and `synface_kernels.sample_classes`.

    Raises:
        ValueError, TypeError: for arguments that do not fit.
        NotImplementedError: for several ranks, or an ``interclass_filtering_threshold``.

    Source: An et al., "Killing Two Birds with One Stone: Efficient and Robust Training of Face
    Recognition CNNs by Partial FC", CVPR 2022; insightface's documentation.
    """

    def __init__(
        self,
        margin_loss: Any,
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        fp16: bool = False,
        *,
        convention: Literal["synface", "insightface"] = "synface",
        sparse: bool = True,
        generator: torch.Generator | None = None,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integer("embedding_size", embedding_size, 1)
        check_integer("num_classes", num_classes, 1)
        check_number("sample_rate", sample_rate, 0, 1)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise NotImplementedError("PartialFC over several ranks is not built yet")
        if sample_rate == 0:
            raise ValueError("sample_rate must be in (0, 1], got 0")
        self.margin = margin_of(margin_loss, convention)
        self.embedding_size, self.num_classes = embedding_size, num_classes
        self.sample_rate, self.sparse = sample_rate, sparse
        self.generator, self.impl = generator, impl
        self.weight = nn.Parameter(
            torch.empty(num_classes, embedding_size, device=device, dtype=dtype)
        )
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, local_embeddings: Tensor, local_labels: Tensor, **options: Any) -> Any:
        """The loss.

        Args:
            local_embeddings: (N, D). local_labels: (N,) or (N, 1) integers in [0, C), or -100.
            options: of `synface_kernels.margin_cross_entropy`, such as ``reduction``,
                ``return_stats``, or ``target_weight`` for (N, K) labels.
        """
        labels = _labels(local_labels, local_embeddings)
        weight = self.weight if self.sparse else _DenseGradient.apply(self.weight)
        class_ids = None
        if self.sample_rate < 1:
            count = max(1, int(self.sample_rate * self.num_classes))
            class_ids, labels = sk.sample_classes(
                labels,
                self.num_classes,
                count,
                self.generator,
                ignore_index=options.get("ignore_index", -100),
            )
        settings: dict[str, Any] = {"margin": self.margin, "impl": self.impl} | options
        return sk.margin_cross_entropy(
            local_embeddings, weight, labels, class_ids=class_ids, **settings
        )

    def extra_repr(self) -> str:
        return (
            f"embedding_size={self.embedding_size}, num_classes={self.num_classes}, "
            f"sample_rate={self.sample_rate}, margin={self.margin}"
        )


def margin_of(
    margin_loss: Any, convention: Literal["synface", "insightface"] = "synface"
) -> sk.CombinedMargin:
    """The margin that an object of insightface's, or a margin of this library, means.

    Args: see `PartialFC`.

    Raises:
        TypeError: for an object that is neither.
        ValueError: for numbers that make no sense, or that insightface's own code refuses.
    """
    if convention not in ("synface", "insightface"):
        raise ValueError(f"convention must be 'synface' or 'insightface', got {convention!r}")
    if isinstance(margin_loss, sk.CombinedMargin):
        return margin_loss
    scale, m1, m2, m3, threshold = _numbers(margin_loss)
    if threshold > 0:
        raise NotImplementedError(f"interclass_filtering_threshold {threshold}: not built yet")
    if convention == "synface":
        margin = sk.CombinedMargin(scale, m1, m2, m3)
    elif m1 == 1 and m3 == 0:
        margin = sk.ArcFace(scale, m2, beyond_pi="none", target_grad="straight_through")
    elif m3 > 0:
        margin = sk.CosFace(scale, m3)
    else:
        raise ValueError(f"insightface has no margin for m1 = {m1}, m2 = {m2}, m3 = {m3}")
    return margin


def _numbers(margin_loss: Any) -> tuple[float, float, float, float, float]:
    """s, m1, m2, m3 and the threshold (0: none) of an object of insightface's."""
    for names in (("m1", "m2", "m3"), ("margin",), ("m",)):
        if all(hasattr(margin_loss, name) for name in ("s", *names)):
            break
    else:
        raise TypeError(
            "margin_loss must be a margin of synface_kernels, or have the attributes s, m1, m2 and "
            "m3 (insightface's CombinedMarginLoss), s and margin (its ArcFace), or s and m (its "
            f"CosFace), got {describe(margin_loss)}"
        )
    threshold = getattr(margin_loss, "interclass_filtering_threshold", 0.0)
    numbers = {name: getattr(margin_loss, name) for name in ("s", *names)}
    for name, value in (*numbers.items(), ("interclass_filtering_threshold", threshold)):
        check_number(f"margin_loss.{name}", value, -math.inf)
    scale, *margins = numbers.values()
    m1, m2, m3 = {"m1": margins, "margin": [1.0, *margins, 0.0], "m": [1.0, 0.0, *margins]}[
        names[0]
    ]
    return scale, m1, m2, m3, threshold


def _labels(labels: Tensor, embeddings: Tensor) -> Tensor:
    """int64 labels; (N, 1) ones as (N,)."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"local_labels must be a tensor, got {describe(labels)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"local_labels must be integers, got {describe(labels)}")
    if labels.dim() == 2 and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    return labels.to(embeddings.device, torch.int64)


class _DenseGradient(torch.autograd.Function):
    """The same tensor, whose gradient is dense even where it comes as a sparse one."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.to_dense() if grad.is_sparse else grad
