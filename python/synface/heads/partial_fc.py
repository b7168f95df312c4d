"""insightface's ``PartialFC_V2``, with its constructor and call, over this library's op."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

import synface_kernels as sk

from ..common.check import check_generator, check_integer, check_number, describe
from ..common.labels import ignored_outside, labels_of
from .fused import FusedHead
from .sharded import scale_grad, split


class PartialFC(FusedHead):
    """Margin softmax over a random sample of the classes: insightface's ``PartialFC_V2``.

    Works without a process group too, on a CPU, with batches of any size, and with any optimizer.
    With a group of P ranks, each holds num_classes/P of the classes, the first ranks one more where
    that is uneven, and has its own batch; the loss is over all ranks' rows and classes.

    Args:
        margin_loss: a margin of this library (`synface_kernels.ArcFace`, …), or an object with the
            attributes of insightface's ``CombinedMarginLoss`` (``s``, ``m1``, ``m2``, ``m3``,
            ``interclass_filtering_threshold``), ``ArcFace`` (``s``, ``margin``) or ``CosFace``
            (``s``, ``m``): its attributes are read, it is not called. Angles are in radians.
        embedding_size: D. num_classes: C, over all ranks.
        sample_rate: in (0, 1]: below 1, each step samples this share of the classes, including
            every positive.
        fp16: accepted without effect. GEMMs are in autocast's dtype where the head is called under
            `torch.autocast`, and sums are float32. For 16-bit centers give ``dtype``.
        convention: how the attributes of an insightface object are interpreted:

            - ``"synface"``: as the arguments of this library's margins: the true gradient, cos θ
              continued monotonically past π, all of m1, m2 and m3, and negatives above
              ``interclass_filtering_threshold`` left out.
            - ``"insightface"``: as in its code (since 2022): the margin's slope is taken as 1,
              cosines rise again past π, m1 and m2 are ignored where m3 > 0, and negatives above
              the threshold get a cosine of 0, which stays in the sum.
        sparse: whether the centers' gradient of a sampled step is a sparse tensor (COO, of S rows),
            for `synface.optim`'s optimizers, `torch.optim.SparseAdam`, or `torch.optim.SGD` without
            weight decay. False: a dense one, for any optimizer, which costs C·D at each step.
        generator: random generator for the classes. Default: torch's for the labels' device.
        group: a `torch.distributed` process group. Default: the default group, if initialized.
        impl: implementation of the op. device, dtype: of the centers.

    State dict: ``weight``, as in insightface: (C, D), or this rank's (num_local, D) beginning with
    class ``class_start``. Centers are drawn from a normal distribution of deviation 0.01; on
    several ranks, the rank is part of the seed, so that no two ranks draw the same centers.

    On P ranks the embeddings' gradient is P times the loss's, as in insightface, so that a backbone
    in `DistributedDataParallel`, which averages, gets the gradient of the loss. The head itself
    stays outside: its gradient is complete on each rank. Where both are in one module, see
    docs/heads.md.

    A label outside [0, C) is an error (insightface returns a loss of 69.0776, silently); rows of
    label -100 are left out.

    Memory: C·D values; a sampled step reads its S rows in place, and returns S rows of gradient,
    unless `step_in_backward` is called. See `synface_kernels.margin_cross_entropy` and
    `synface_kernels.sample_classes`.

    Raises:
        ValueError, TypeError: for arguments that do not fit.

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
        group: Any = None,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_integer("embedding_size", embedding_size, 1)
        check_integer("num_classes", num_classes, 1)
        check_number("sample_rate", sample_rate, 0, 1, above=True)
        check_generator(generator)
        margin = margin_of(margin_loss, convention)
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        rank, ranks = (
            (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        )
        if num_classes < ranks:
            raise ValueError(
                f"num_classes must be at least the number of ranks, {ranks}, got {num_classes}"
            )
        classes = split(num_classes, ranks)
        shape = (classes[rank], embedding_size)
        super().__init__(shape, margin, sparse=sparse, impl=impl, device=device, dtype=dtype)
        self.rank, self.world_size, self.group = rank, ranks, group if ranks > 1 else None
        self.embedding_size, self.num_classes = embedding_size, num_classes
        self.num_local, self.class_start = classes[rank], sum(classes[:rank])
        self.sample_rate, self.generator = sample_rate, generator
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Redraw the centers."""
        start = None
        if self.group is not None and not self.weight.is_meta:
            seed = int(torch.randint(2**62, (), device="cpu")) + self.rank
            start = torch.Generator(self.weight.device).manual_seed(seed)
        nn.init.normal_(self.weight, std=0.01, generator=start)

    def forward(self, local_embeddings: Tensor, local_labels: Tensor, **options: Any) -> Any:
        """Return the margin softmax loss.

        Args:
            local_embeddings: (N, D). local_labels: (N,) or (N, 1) integers in [0, C), or -100, of
                any integer dtype.
            options: of `synface_kernels.margin_cross_entropy`, such as ``reduction``,
                ``return_stats``, or ``target_weight`` for (N, K) labels.
        """
        labels = labels_of(local_labels, options.get("target_weight") is not None)
        if isinstance(labels, Tensor):
            labels = labels.to(self.weight.device)
        shard = {}
        if self.group is not None:
            shard = {"group": self.group, "class_start": self.class_start}
            local_embeddings = scale_grad(local_embeddings, self.world_size)
        options, indices = dict(**options, **shard), None
        if self.sample_rate < 1:
            ignored = options.get("ignore_index", -100)
            if self.group is None:  # with one, labels are not replaced by indices
                labels, ignored = ignored_outside(labels, ignored, self.num_classes)
            options["ignore_index"] = shard["ignore_index"] = ignored
            options["class_ids"], indices = self._sampled(local_embeddings, labels, shard)
        return self._loss(local_embeddings, labels, options, indices)

    def _sampled(
        self, embeddings: Tensor, labels: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Return the classes of this step, and the labels as indices into them."""
        count = max(1, int(self.sample_rate * self.num_local))

        def draw() -> tuple[Tensor, Tensor]:
            return sk.sample_classes(labels, self.num_local, count, self.generator, **options)

        if self.generator is not None:
            return self._settled_eagerly("sampled classes", embeddings, labels, draw)
        drawn = draw()  # advances torch's generator in a recomputed pass as in the original one
        return self._settled("sampled classes", embeddings, labels, lambda: drawn)

    def extra_repr(self) -> str:
        return (
            f"embedding_size={self.embedding_size}, num_classes={self.num_classes}, "
            f"sample_rate={self.sample_rate}, margin={self.margin}, "
            f"rank {self.rank} of {self.world_size}"
        )


def margin_of(
    margin_loss: Any, convention: Literal["synface", "insightface"] = "synface"
) -> sk.CombinedMargin:
    """Return the margin that an insightface object, or a margin of this library, describes.

    Args: see `PartialFC`.

    Raises:
        TypeError: for an object that is neither.
        ValueError: for values out of range, or that insightface's own code refuses.
    """
    if convention not in ("synface", "insightface"):
        raise ValueError(f"convention must be 'synface' or 'insightface', got {convention!r}")
    if isinstance(margin_loss, sk.CombinedMargin):
        return margin_loss
    scale, m1, m2, m3, threshold = _numbers(margin_loss)
    limit = threshold if 0 < threshold < 1 else None  # 0 disables it, and no cosine exceeds 1
    if convention == "synface":
        return sk.CombinedMargin(scale, m1, m2, m3, interclass_filter=limit)
    if m3 > 0:
        m1, m2 = 1.0, 0.0
    elif m1 != 1 or m3 < 0:
        raise ValueError(f"insightface has no margin for m1 = {m1}, m2 = {m2}, m3 = {m3}")
    return sk.CombinedMargin(
        scale,
        m1,
        m2,
        m3,
        beyond_pi="none",
        target_grad="straight_through",
        interclass_filter=limit,
        interclass_filter_mode="zero",
    )


def _numbers(margin_loss: Any) -> tuple[float, float, float, float, float]:
    """Return s, m1, m2, m3 and the threshold (0: none) of an insightface object."""
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
