"""Margins, which change the target's cosine before the softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..._check import describe, is_dense, number
from ..._derivatives import once
from ..._limits import SHARPEST

OP = "margin_cross_entropy"
# The margin's slope divides by sin θ, which vanishes at cos θ = ±1: it is clamped to this, a little
# above √ε = 3e-4, below which a float32 cosine does not resolve the angle.
SIN_MIN = 1e-3

# The open range of each margin, and what it is.
RANGES = {
    "m1": (0.0, 16.0, "a factor of the angle"),
    "m2": (-math.pi, math.pi, "an angle in radians"),
    "m3": (-2.0, 2.0, "a difference of cosines"),
}

Margin: TypeAlias = "float | Tensor"
BeyondPi: TypeAlias = Literal["linear", "none", "easy"]


@dataclass(frozen=True, eq=False)
class CombinedMargin:
    """Combined margin ψ(cos θ) = cos(m1·θ + m2) − m3, and logits of ``scale`` times that.

    Args:
        scale: s in (0, 1e6], the inverse temperature of the softmax; no unit.
        m1: multiplicative angular margin (SphereFace), in (0, 16), no unit.
        m2: additive angular margin (ArcFace), **in radians**, |m2| < π.
        m3: additive cosine margin (CosFace); |m3| < 2.
            Each of m1, m2 and m3 is a float or an (N,) tensor, one value per sample; a tensor may
            require a gradient. The op checks its values, but for those of ignored rows, those that
            are not finite, and under the transforms of torch.func.
        beyond_pi: the continuation past m1·θ + m2 > π, where the cosine would rise again.
            ``"linear"`` is cos θ − max(m2·sin m2, 1 + cos((π − m2)/m1)) − m3, which falls
            monotonically, and for ArcFace is cos θ − m2·sin(π − m2) (its authors' first code, and
            SynFace's); ``"none"`` leaves the cosine as it is (insightface since 2022); ``"easy"``
            has margins m1 and m2 only where cos θ > 0, and cos θ − m3 elsewhere (the "easy margin"
            of ArcFace's and SynFace's code), which jumps at θ = π/2.
        target_grad: ``"exact"`` takes dψ/dcos θ = m1·sin(m1·θ + m2)/sin θ with sin θ ≥ 1e-3;
            ``"straight_through"`` takes 1, as insightface does since 2022.
        interclass_filter: a cosine t in [−1, 1]: classes that are no target of a row and have a
            larger plain cosine with it, presumably the same person under another label, are
            filtered. They get no gradient from that row, and do not count in its top1.
        interclass_filter_mode: ``"drop"`` leaves filtered classes out of the softmax; ``"zero"``
            sets their logits to 0 (insightface's ``interclass_filtering_threshold``).

    Raises:
        ValueError: for a margin out of range (for example an angle in degrees).
        TypeError: for a margin that is neither a number nor a tensor.

    Source: Deng et al., "ArcFace" (CVPR 2019), eq. 4; Qiu et al., "SynFace" (ICCV 2021).
    """

    scale: float = 64.0
    m1: Margin = 1.0
    m2: Margin = 0.0
    m3: Margin = 0.0
    beyond_pi: BeyondPi = "linear"
    target_grad: Literal["exact", "straight_through"] = "exact"
    interclass_filter: float | None = field(default=None, kw_only=True)
    interclass_filter_mode: Literal["drop", "zero"] = field(default="drop", kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", number("scale", self.scale))
        if not 0 < self.scale < math.inf:  # math.isfinite takes no symbolic float
            raise ValueError(f"scale must be finite and positive, got {self.scale}")
        if self.scale > SHARPEST:
            raise ValueError(f"scale must be at most {SHARPEST:g}, got {self.scale}")
        for name, (low, high, hint) in RANGES.items():
            value = getattr(self, name)
            if isinstance(value, Tensor):
                if not is_dense(value) or value.dim() != 1 or not value.is_floating_point():
                    raise ValueError(
                        f"{name} must be a float or a floating-point tensor of shape (N,), "
                        f"got {describe(value)}"
                    )
                continue
            value = number(name, value, "a float or a tensor")
            object.__setattr__(self, name, value)
            if not low < value < high:  # NaN fails too
                raise ValueError(
                    f"{name} is {hint} and must be between {low:.6g} and {high:.6g}, got {value}"
                )
        if self.beyond_pi not in ("linear", "none", "easy"):
            raise ValueError(
                f"beyond_pi must be 'linear', 'none' or 'easy', got {self.beyond_pi!r}"
            )
        if self.target_grad not in ("exact", "straight_through"):
            raise ValueError(
                f"target_grad must be 'exact' or 'straight_through', got {self.target_grad!r}"
            )

        limit = self.interclass_filter
        if limit is not None:
            limit = number("interclass_filter", limit, "a float or None")
            object.__setattr__(self, "interclass_filter", limit)
        if limit is not None and not -1 <= limit <= 1:
            raise ValueError(
                f"interclass_filter is a cosine and must be in [-1, 1] or None, got {limit}"
            )
        if self.interclass_filter_mode not in ("drop", "zero"):
            raise ValueError(
                "interclass_filter_mode must be 'drop' or 'zero', "
                f"got {self.interclass_filter_mode!r}"
            )

    @property
    def limit(self) -> float:
        """Cosine above which classes are filtered; ∞ for none."""
        return math.inf if self.interclass_filter is None else self.interclass_filter

    def tensors(self) -> dict[str, Tensor]:
        """Return the margins that are tensors, by name."""
        values = ((name, getattr(self, name)) for name in RANGES)
        return {name: value for name, value in values if isinstance(value, Tensor)}

    def check_rows(self, rows: int, device: torch.device) -> None:
        """Raise ValueError where a margin that is a tensor is not of so many rows on the device."""
        for name, value in self.tensors().items():
            if value.shape[0] != rows or value.device != device:
                raise ValueError(
                    f"margin's {name} must, as a tensor, be of shape ({rows},) on {device}, "
                    f"got {tuple(value.shape)} on {value.device}"
                )

    def target_cosine(self, cosine: Tensor) -> Tensor:
        """Return ψ of (N, M) plain cosines, with the gradient that ``target_grad`` names.

        The value follows the margins too, so a margin that requires a gradient gets one. The
        gradients have no derivative, but those by m3.
        """
        if self.tensors():
            self.check_rows(cosine.shape[0], cosine.device)
        m1, m2, m3 = (self._per_row(name, cosine) for name in RANGES)
        if self._is(m1, 1.0) and self._is(m2, 0.0):
            return cosine - m3
        # The slope is a constant of the graph, so second derivatives would lack its part.
        cosine = once(OP, cosine, forward_mode=True)
        m1, m2 = (
            once(OP, each, forward_mode=True) if isinstance(each, Tensor) else each
            for each in (m1, m2)
        )

        fixed = cosine.detach().clamp(-1.0, 1.0)
        theta = fixed.acos()
        angle = m1 * theta + m2
        psi = angle.cos()
        if self.target_grad == "exact":
            slope = m1 * angle.sin() / theta.sin().clamp_min(SIN_MIN)
        else:
            slope = torch.ones_like(fixed)
        slope = torch.where(
            angle.isnan(), 0, slope
        )  # a row of NaN passes none on, not even NaN · 0
        if self.beyond_pi == "linear":
            beyond = angle > math.pi
            psi = torch.where(beyond, fixed - _drop(m1, m2), psi)
            slope = torch.where(beyond, torch.ones_like(slope), slope)
        elif self.beyond_pi == "easy":
            without = fixed <= 0
            psi = torch.where(without, fixed, psi)
            slope = torch.where(without, torch.ones_like(slope), slope)
        return psi + slope.detach() * (cosine - cosine.detach()) - m3

    def _per_row(self, name: str, cosine: Tensor) -> Margin:
        value: Margin = getattr(self, name)
        return value.to(cosine.dtype).unsqueeze(1) if isinstance(value, Tensor) else value

    @staticmethod
    def _is(value: Margin, number: float) -> bool:
        return not isinstance(value, Tensor) and value == number


def _drop(m1: Margin, m2: Margin) -> Margin:
    """Return how far below cos θ the linear continuation runs, to be monotone at the joint."""
    angle = (math.pi - m2) / m1  # θ at the joint
    if isinstance(angle, Tensor):
        m2 = m2 if isinstance(m2, Tensor) else torch.full_like(angle, m2)
        return torch.maximum(m2 * m2.sin(), 1 + angle.cos())
    assert not isinstance(m2, Tensor)
    return max(m2 * math.sin(m2), 1 + math.cos(angle))


# The margins are dataclasses of their own for `dataclasses.replace`: a field that a class fixes is
# no argument of it.


@dataclass(frozen=True, eq=False)
class _Order:
    """A base whose fields are in the order of the arguments: Dynamo (torch 2.11) binds them so."""

    scale: float = 64.0
    margin: Margin = 0.0
    beyond_pi: BeyondPi = "linear"
    target_grad: Literal["exact", "straight_through"] = "exact"


@dataclass(frozen=True, eq=False, init=False)
class ArcFace(CombinedMargin, _Order):
    """Additive angular margin: cos(θ + margin).

    Args:
        margin: **in radians**, |margin| < π; a float or an (N,) tensor.
        scale, beyond_pi, target_grad; errors: see `CombinedMargin`.

    Source: Deng et al., "ArcFace", CVPR 2019.
    """

    m1: Margin = field(init=False, repr=False)
    m2: Margin = field(init=False, repr=False)
    m3: Margin = field(init=False, repr=False)
    margin: Margin = 0.5

    def __init__(
        self,
        scale: float = 64.0,
        margin: Margin = 0.5,
        beyond_pi: BeyondPi = "linear",
        target_grad: Literal["exact", "straight_through"] = "exact",
        *,
        interclass_filter: float | None = None,
        interclass_filter_mode: Literal["drop", "zero"] = "drop",
    ) -> None:
        super().__init__(
            scale,
            1.0,
            margin,
            0.0,
            beyond_pi,
            target_grad,
            interclass_filter=interclass_filter,
            interclass_filter_mode=interclass_filter_mode,
        )
        object.__setattr__(self, "margin", self.m2)


@dataclass(frozen=True, eq=False, init=False)
class CosFace(CombinedMargin, _Order):
    """Additive cosine margin: cos θ − margin.

    Args:
        margin: a difference of cosines, |margin| < 2; a float or an (N,) tensor.
        scale; errors: see `CombinedMargin`.

    Source: Wang et al., "CosFace", CVPR 2018.
    """

    m1: Margin = field(init=False, repr=False)
    m2: Margin = field(init=False, repr=False)
    m3: Margin = field(init=False, repr=False)
    beyond_pi: BeyondPi = field(init=False, repr=False)
    target_grad: Literal["exact", "straight_through"] = field(init=False, repr=False)
    margin: Margin = 0.35

    def __init__(
        self,
        scale: float = 64.0,
        margin: Margin = 0.35,
        *,
        interclass_filter: float | None = None,
        interclass_filter_mode: Literal["drop", "zero"] = "drop",
    ) -> None:
        super().__init__(
            scale,
            1.0,
            0.0,
            margin,
            interclass_filter=interclass_filter,
            interclass_filter_mode=interclass_filter_mode,
        )
        object.__setattr__(self, "margin", self.m3)


@dataclass(frozen=True, eq=False, init=False)
class SphereFace(CombinedMargin, _Order):
    """Multiplicative angular margin: cos(margin·θ).

    Args:
        margin: a factor of the angle, in (0, 16); a float or an (N,) tensor. 1.35 is the value in
            the ArcFace paper's comparison.
        scale, beyond_pi, target_grad; errors: see `CombinedMargin`.

    Source: Liu et al., "SphereFace", CVPR 2017.
    """

    m1: Margin = field(init=False, repr=False)
    m2: Margin = field(init=False, repr=False)
    m3: Margin = field(init=False, repr=False)
    margin: Margin = 1.35

    def __init__(
        self,
        scale: float = 64.0,
        margin: Margin = 1.35,
        beyond_pi: BeyondPi = "linear",
        target_grad: Literal["exact", "straight_through"] = "exact",
        *,
        interclass_filter: float | None = None,
        interclass_filter_mode: Literal["drop", "zero"] = "drop",
    ) -> None:
        super().__init__(
            scale,
            margin,
            0.0,
            0.0,
            beyond_pi,
            target_grad,
            interclass_filter=interclass_filter,
            interclass_filter_mode=interclass_filter_mode,
        )
        object.__setattr__(self, "margin", self.m1)
