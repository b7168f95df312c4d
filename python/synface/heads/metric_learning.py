"""pytorch-metric-learning's margin losses, with its names and arguments, over this library's op.

Intentional differences from pytorch-metric-learning (PML):

- a label outside [0, num_classes) is an error; a label of -100 leaves its row out;
- beyond θ + margin = π the losses agree for margins up to 133° (for larger ones PML's rises again);
- at cos θ = ±1 the gradient is finite (PML's is NaN);
- the centers keep their dtype: with float64 embeddings they are cast to float64 for that call
  alone, and half-precision embeddings are computed in float32;
- only ``get_logits``, which returns them, holds N×C logits.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import synface_kernels as sk

from ..common.check import check_integer, check_number, describe
from ..common.labels import labels_of
from .centers_view import CentersView, transposed, untransposed
from .fused import check_impl

_DEFAULTS = {"distance": "CosineSimilarity", "reducer": "MeanReducer"}  # PML's


class _Loss(nn.Module):
    """Base class of the losses; ``weight`` is (C, D), or (C, S, D) with S sub-centers a class.

    ``distance`` and ``reducer`` are those given, or new objects of the default types, and may be
    assigned.

    Args:
        shape: of ``weight``, by the names of the constructor's arguments.
        margin: of the op. Others: see `ArcFaceLoss`.
    """

    weight: nn.Parameter
    _margin_name = "m2"  # the attribute of the op's margin that PML calls margin

    def __init__(
        self,
        shape: dict[str, int],
        margin: sk.CombinedMargin,
        *,
        weight_init_func: Callable[[Tensor], Any] | None = None,
        weight_regularizer: Callable[[Tensor], Tensor] | None = None,
        weight_reg_weight: float = 1.0,
        embedding_regularizer: Callable[[Tensor], Tensor] | None = None,
        embedding_reg_weight: float = 1.0,
        reducer: Callable[..., Any] | None = None,
        distance: Any = None,
        collect_stats: bool | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        for name, size in shape.items():
            check_integer(name, size, 1)
        check_impl(impl)
        if collect_stats:
            raise NotImplementedError("collect_stats is not supported: leave it at None")
        self._margin = margin
        self.num_classes = shape["num_classes"]
        self.weight_regularizer, self.weight_reg_weight = weight_regularizer, weight_reg_weight
        self.embedding_regularizer = embedding_regularizer
        self.embedding_reg_weight = embedding_reg_weight
        self.reducer, self.distance = reducer, distance
        self.impl = impl
        self.weight_init_func = weight_init_func or nn.init.normal_
        self.weight = nn.Parameter(torch.empty(*shape.values()))
        self.reset_parameters()
        self.register_load_state_dict_pre_hook(_from_pml)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Redraw the centers by ``weight_init_func``."""
        centers = torch.empty_like(transposed(self.weight), memory_format=torch.contiguous_format)
        self.weight_init_func(centers)  # as (D, C), so that a seed gives PML's values
        self.weight.copy_(untransposed(centers, self.weight))

    @property
    def W(self) -> Tensor:
        """A view of the centers with PML's shape, (D, C) or (D, C·S).

        It may be read, written in place or by ``W.data = …``, clipped, frozen, and given to an
        optimizer; ``loss.W = …`` is an error. ``{"W": loss.W}`` is a state dict of PML's loss.
        """
        return CentersView.of(self.weight)

    @property
    def scale(self) -> float:
        """The factor s of the logits; may be assigned."""
        return self._margin.scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._margin = replace(self._margin, scale=value)

    @property
    def margin(self) -> float:
        """The margin in **radians** (in cosines for CosFace), as in PML; may be assigned."""
        return float(getattr(self._margin, self._margin_name))

    @margin.setter
    def margin(self, value: float) -> None:
        try:
            changed: dict[str, Any] = {self._margin_name: float(value)}
        except (TypeError, ValueError):
            raise TypeError(
                f"margin must be a number, in radians (in cosines for CosFaceLoss), got "
                f"{describe(value)}: for a margin of another kind use synface.heads.MarginHead"
            ) from None
        self._margin = replace(self._margin, **changed)

    def __getattr__(self, name: str) -> Any:
        """Return PML's default if no distance or reducer was given; the loss needs neither."""
        if name not in _DEFAULTS or name in self._modules:
            return super().__getattr__(name)
        kind = _DEFAULTS[name]
        try:
            found = importlib.import_module(f"pytorch_metric_learning.{name}s")
        except ImportError as error:
            raise AttributeError(  # which hasattr and inspect expect
                f"{type(self).__name__}.{name} was not given, and its default is "
                f"pytorch_metric_learning's {kind}, which cannot be imported ({error}): install "
                "pytorch-metric-learning, or do without"
            ) from error
        return getattr(found, kind)()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "W":
            if isinstance(value, CentersView) and value._weight is self.weight:
                return  # ``loss.W += 1`` has already written in place
            raise AttributeError(
                f"W is a view of loss.weight, {tuple(self.weight.shape)}, and cannot be replaced: "
                "copy values by loss.W.data = values, or assign loss.weight = nn.Parameter(…) "
                "of that shape before the optimizer is made"
            )
        if name not in _DEFAULTS:
            super().__setattr__(name, value)
            return
        if name == "distance":
            _check_distance(value)
        for attributes in (self._modules, self.__dict__):
            attributes.pop(name, None)
        if value is not None:
            (self._modules if isinstance(value, nn.Module) else self.__dict__)[name] = value

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_margin" not in state:  # older pickles
            state = state | {"_margin": state["margin"]}
        super().__setstate__(
            {k: v for k, v in state.items() if v is not None or k not in _DEFAULTS}
        )

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Sequence[Tensor] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Any:
        """Return the loss: a scalar, or the result of ``reducer`` on the rows' losses.

        Args:
            embeddings: (N, D). labels: (N,) or (N, 1) integers in [0, num_classes), or -100 to
                leave a row out; they are moved to the embeddings' device.
            indices_tuple: a miner's pairs or triplets. A row's loss is weighted by its number of
                occurrences in them, divided by the largest such number; the mean is over all rows.
            ref_emb, ref_labels: not supported, as in PML.

        Raises:
            ValueError, TypeError: as `synface_kernels.margin_cross_entropy`.
        """
        if labels is None:
            raise ValueError("labels are required for this loss")
        if (ref_emb is not None and ref_emb is not embeddings) or (
            ref_labels is not None and ref_labels is not labels
        ):
            raise ValueError("ref_emb and ref_labels are not supported for this loss")
        for name, value in (("embeddings", embeddings), ("labels", labels)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {describe(value)}")
        labels = labels_of(labels)
        if labels.dim() != 1:
            raise ValueError(f"labels must be int64 of shape (N,), got {describe(labels)}")
        labels = labels.to(embeddings.device)
        weight: Tensor = self.weight
        if embeddings.dtype == torch.float64:
            weight = weight.double()  # for this call; PML casts its centers permanently
        reducer = self._modules.get("reducer", self.__dict__.get("reducer"))  # not the default
        plain = reducer is None and indices_tuple is None
        losses = sk.margin_cross_entropy(
            embeddings,
            weight,
            labels,
            self._margin,
            reduction="mean" if plain else "none",
            impl=self.impl,
        )
        if indices_tuple is not None:
            losses = losses * _miner_weights(indices_tuple, losses)
        loss: Any
        if reducer is not None:
            rows = torch.arange(len(losses), device=losses.device)
            entry = {"losses": losses, "indices": rows, "reduction_type": "element"}
            loss = reducer({"loss": entry}, embeddings, labels)
        else:
            loss = losses if plain else losses.mean()
        if self.weight_regularizer is not None:
            loss = loss + self.weight_reg_weight * self.weight_regularizer(
                transposed(self.weight).T
            )
        if self.embedding_regularizer is not None:
            loss = loss + self.embedding_reg_weight * self.embedding_regularizer(embeddings)
        return loss

    def get_cosine(self, embeddings: Tensor) -> Tensor:
        """Return (N, C) cosines; of sub-centers, each class's highest. Memory: N·C (N·C·S)."""
        dtype = torch.promote_types(embeddings.dtype, self.weight.dtype)
        cosine = normalize(embeddings.to(dtype)) @ normalize(transposed(self.weight).T.to(dtype)).T
        return cosine.unflatten(1, (self.num_classes, -1)).amax(2)

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """Return (N, C) logits scale·cosine, without margins."""
        return self.get_cosine(embeddings) * self.scale

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}, margin={self._margin}"


def _from_pml(module: _Loss, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Replace PML's ``W``, of shape (D, C), in a state dict by ``weight``."""
    pml = state_dict.pop(prefix + "W", None)
    if pml is None:
        return
    shape = transposed(module.weight).shape
    if pml.shape != shape:
        raise ValueError(f"{prefix}W must be of shape {tuple(shape)}, got {tuple(pml.shape)}")
    state_dict[prefix + "weight"] = untransposed(pml, module.weight)


def _check_distance(distance: Any) -> None:
    if distance is not None and (
        type(distance).__name__ != "CosineSimilarity" or getattr(distance, "power", 1) != 1
    ):
        raise ValueError(
            f"distance must be CosineSimilarity with power 1 or None, got {distance!r}"
        )


def _miner_weights(indices_tuple: Sequence[Tensor], losses: Tensor) -> Tensor:
    """Return each row's number of occurrences in a miner's tuple, over the largest one, (N,)."""
    if len(indices_tuple) not in (3, 4) or not all(isinstance(x, Tensor) for x in indices_tuple):
        raise ValueError("indices_tuple must be 3 (triplets) or 4 (pairs) tensors of indices")
    indices = torch.cat([part.to(losses.device) for part in indices_tuple])
    if indices.numel() == 0:
        return torch.ones_like(losses)
    if indices.is_floating_point() or not 0 <= indices.min() <= indices.max() < len(losses):
        raise ValueError(f"indices_tuple must hold integers in [0, {len(losses)}) (N)")
    counts = torch.zeros_like(losses).index_add_(
        0, indices, torch.ones_like(indices, dtype=losses.dtype)
    )
    return counts / counts.max()


class ArcFaceLoss(_Loss):
    """pytorch-metric-learning's ``ArcFaceLoss``: cos(θ + margin), the margin in **degrees**.

    Args:
        num_classes: C. embedding_size: D.
        margin: in degrees. scale: s.
        options: ``weight_init_func`` (of the (D, C) centers; default: normal, so that a seed gives
            the centers of PML's loss), ``weight_regularizer`` and ``embedding_regularizer`` (called
            with (C, D) centers and (N, D) embeddings; added with ``weight_reg_weight`` and
            ``embedding_reg_weight``), ``reducer`` (called as in PML, with the rows' losses),
            ``distance`` (CosineSimilarity or None), ``impl``. ``collect_stats`` is not supported.

    State dict: ``weight`` (C, D); PML's, ``W`` (D, C), loads too. The property `W` returns it.

    Memory: as `synface_kernels.margin_cross_entropy`; during construction, twice the centers.

    Raises:
        ValueError, TypeError, NotImplementedError: for invalid or unsupported arguments.

    Source: Deng et al., "ArcFace", CVPR 2019; pytorch-metric-learning's documentation.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 28.6,
        scale: float = 64,
        **options: Any,
    ) -> None:
        shape = {"num_classes": num_classes, "embedding_size": embedding_size}
        super().__init__(shape, _arcface(scale, margin), **options)


class CosFaceLoss(_Loss):
    """pytorch-metric-learning's ``CosFaceLoss``: cos θ − margin.

    Args:
        num_classes: C. embedding_size: D.
        margin: a difference of cosines. scale: s.
        options: see `ArcFaceLoss`; state dict, memory and errors too.

    Source: Wang et al., "CosFace", CVPR 2018; pytorch-metric-learning's documentation.
    """

    _margin_name = "m3"

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.35,
        scale: float = 64,
        **options: Any,
    ) -> None:
        shape = {"num_classes": num_classes, "embedding_size": embedding_size}
        super().__init__(shape, sk.CombinedMargin(scale, m3=margin), **options)


class SubCenterArcFaceLoss(_Loss):
    """pytorch-metric-learning's ``SubCenterArcFaceLoss``, with the cosine of the best sub-center.

    Args:
        num_classes: C. embedding_size: D.
        margin: in **degrees**. scale: s. sub_centers: S, for each class.
        options: see `ArcFaceLoss`; memory and errors too.

    State dict: ``weight`` (C, S, D); PML's, ``W`` (D, C·S), loads too.

    Source: Deng et al., "Sub-center ArcFace", ECCV 2020; pytorch-metric-learning's documentation.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 28.6,
        scale: float = 64,
        sub_centers: int = 3,
        **options: Any,
    ) -> None:
        shape = {
            "num_classes": num_classes,
            "sub_centers": sub_centers,
            "embedding_size": embedding_size,
        }
        super().__init__(shape, _arcface(scale, margin), **options)

    @torch.no_grad()
    def get_outliers(
        self,
        embeddings: Tensor,
        labels: Tensor,
        threshold: float = 75,
        return_dominant_centers: bool = True,
    ) -> Any:
        """Return the embeddings far from their class's dominant sub-center.

        The dominant sub-center is the one nearest to most of the class's embeddings.

        Args:
            embeddings: (N, D). labels: (N,) integers in [0, C).
            threshold: angle in degrees beyond which an embedding is an outlier.
            return_dominant_centers: return the dominant sub-centers, too.

        Returns:
            (O,) int64 indices into ``embeddings``, by label, and (D, C) dominant sub-centers, 0 for
            classes without embeddings. (PML always returns both, and leaves the centers of absent
            classes undefined.)
        """
        check_number("threshold", threshold, 0, 180)
        labels = labels_of(labels)
        if embeddings.dim() != 2 or labels.shape != embeddings.shape[:1]:
            raise ValueError(
                "embeddings (N, D) and labels (N,) must have the same N, "
                f"got {describe(embeddings)} and {describe(labels)}"
            )
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(f"labels must be in [0, {self.num_classes})")
        order = labels.argsort(stable=True)
        dtype = torch.promote_types(embeddings.dtype, self.weight.dtype)
        own = normalize(self.weight[labels[order]].to(dtype), dim=2)
        cosine = (own @ normalize(embeddings[order].to(dtype))[:, :, None]).squeeze(2)  # (N, S)
        nearest = nn.functional.one_hot(cosine.argmax(1), cosine.shape[1])
        votes = nearest.new_zeros(self.weight.shape[:2])
        votes.index_add_(0, labels[order], nearest)
        dominant = votes.argmax(1)
        best = cosine.gather(1, dominant[labels[order], None]).squeeze(1)
        outliers = order[best < math.cos(math.radians(threshold))]
        if not return_dominant_centers:
            return outliers
        centers = self.weight[torch.arange(len(dominant), device=dominant.device), dominant]
        return outliers, torch.where(votes.any(1)[:, None], centers, 0).T


def _arcface(scale: float, degrees: float) -> sk.CombinedMargin:
    check_number("margin (in degrees)", degrees, -180, 180)
    return sk.CombinedMargin(scale, m2=math.radians(degrees))
