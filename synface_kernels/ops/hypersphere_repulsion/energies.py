"""The repulsion energies that `hypersphere_repulsion` computes.

Throughout, x̂ = x/‖x‖, r_ij = ‖x̂_i − x̂_j‖ and c_ij = x̂_i·x̂_j = 1 − r_ij²/2. Without a gallery y
the *pairs* are the P = N·(N−1)/2 unordered pairs i < j, and a point's neighbors are all others;
with one they are all P = N·M pairs (x_i, y_j), and a point's neighbors are the rows of y.

Pairs closer than `r_min` are treated as `r_min` apart, in their own direction. Identical points
have no direction: x_i (the point with the lower index, or the one in x) is pushed along the axis
k = (i + j) mod D, or the next one where |x̂_i[k]| > 0.8, and the other point the opposite way. So
the gradient of every energy is finite and, unless D = 1, identical points separate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from ..._check import integer, number
from ..._limits import SHARPEST

R_MIN = 1e-6
SHARPNESS = f"in (0, {SHARPEST:g}]"  # formatted here because Dynamo formats no floats


class Potential(NamedTuple):
    """A function f of a pair's distance that the op ``pairs`` sums, in its schema's terms.

    Attributes:
        kind: ``"log_sum_exp"``, ``"riesz"``, ``"log"`` or ``"hinge"``.
        a: the parameter: t, s, unused, or the threshold.
        power: of the hinge.
        r_min: closer pairs are treated as this far apart.
    """

    kind: str
    a: float = 0.0
    power: int = 0
    r_min: float = R_MIN

    @property
    def is_exponential(self) -> bool:
        """True where the op returns log Σ exp(a·c) rather than Σ f."""
        return self.kind == "log_sum_exp"


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


@dataclass(frozen=True)
class Energy:
    """Base class of the energies; their arguments, NumPy's numbers too, become Python's.

    Attributes:
        per_point: whether every point has an energy of its own, for ``reduction="none"``.
    """

    per_point: ClassVar[bool] = False

    @property
    def r_min(self) -> float:
        """The distance that closer pairs are treated as."""
        return R_MIN

    def _number(self, name: str, expected: str) -> float:
        value = number(name, getattr(self, name), f"a number, {expected}")
        object.__setattr__(self, name, value)
        return value

    def _integer(self, name: str, expected: str) -> int:
        value = integer(name, getattr(self, name), -(2**63), f"an int, {expected}")
        object.__setattr__(self, name, value)
        return value

    def _sharpness(self) -> None:
        t = self._number("t", SHARPNESS)
        _require(0 < t <= SHARPEST, "t", t, SHARPNESS)


# ---- of each point's nearest neighbors ----------------------------------------------------------


@dataclass(frozen=True)
class NeighborEnergy(Energy):
    """Base class of the energies of each point's nearest neighbors."""

    per_point: ClassVar[bool] = True

    @property
    def neighbors(self) -> int:
        """The number k of neighbors of a point."""
        return 1

    def of_points(self, square: Tensor) -> Tensor:
        """Return each point's energy (N,) from the squared distances (N, k) to its neighbors."""
        return (1 - square / 2).mean(1)

    def total(
        self, each: Tensor, stacked: Callable[[Tensor], Tensor], num_points: int, mean: bool
    ) -> Tensor:
        """Return the energy of all points.

        Args:
            each: (N,) energies of this rank's points.
            stacked: returns a scalar of each rank, (P,).
            num_points: the number of all ranks' points. mean: divide by it.
        """
        total = stacked(each.sum()).sum()
        return total / num_points if mean else total


@dataclass(frozen=True)
class MaxCosine(NeighborEnergy):
    """The mean cosine of each point to its k nearest neighbors j, e_i = (1/k)·Σ_j c_ij.

    ``"mean"``: (1/N)·Σ_i e_i; ``"sum"``: Σ_i e_i; ``"none"``: e (N,). The choice of neighbors is
    piecewise constant, so it passes no gradient; their cosines do, to both points.

    HyperFace's gallery term, the mean cosine distance to the nearest gallery row, is
    ``1 - hypersphere_repulsion(x, gallery, energy=MaxCosine())``.

    Args:
        topk: k ≥ 1, the number of neighbors.

    Raises:
        TypeError, ValueError: for a wrong argument, naming it.

    Source: Shahreza and Marcel, "HyperFace", ICLR 2025, for the gallery term.
    """

    topk: int = 1

    def __post_init__(self) -> None:
        topk = self._integer("topk", "at least 1")
        _require(topk >= 1, "topk", topk, "at least 1")

    @property
    def neighbors(self) -> int:
        return self.topk


@dataclass(frozen=True)
class ClosestPair(NeighborEnergy):
    """The greatest cosine of all pairs, max c_ij: 1 minus HyperFace's least cosine distance.

    One number, so ``"mean"`` and ``"sum"`` are the same. Among equal pairs the one with the lowest
    i, then j, takes the gradient. The choice is piecewise constant.

    Source: Shahreza and Marcel, "HyperFace", ICLR 2025.
    """

    per_point: ClassVar[bool] = False

    def total(
        self, each: Tensor, stacked: Callable[[Tensor], Tensor], num_points: int, mean: bool
    ) -> Tensor:
        own = each.max(0).values if each.shape[0] > 0 else each.sum() - math.inf
        return stacked(own).max(0).values


@dataclass(frozen=True)
class KoLeo(NeighborEnergy):
    """The Kozachenko–Leonenko entropy: e_i = −log r_ij for the nearest neighbor j of x_i.

    ``"mean"``: (1/N)·Σ_i e_i; ``"sum"``: Σ_i e_i; ``"none"``: e (N,). The choice of neighbors is
    piecewise constant.

    Source: Sablayrolles et al., "Spreading vectors for similarity search", ICLR 2019.
    """

    def of_points(self, square: Tensor) -> Tensor:
        # Less than r_min counts as r_min, with r²'s own derivative, which is that at r_min.
        apart = square.detach().clamp_min(R_MIN**2) + (square - square.detach())
        return -apart[:, 0].log() / 2


# ---- of all pairs --------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairEnergy(Energy):
    """Base class of the energies of all pairs."""

    @property
    def potential(self) -> Potential:
        """The function that is summed over the pairs."""
        raise NotImplementedError

    def total(self, pair_sum: Tensor, num_pairs: int, mean: bool) -> Tensor:
        """Return the energy from what the op ``pairs`` returns for `potential`."""
        return pair_sum / num_pairs if mean else pair_sum


@dataclass(frozen=True)
class LogSumExp(PairEnergy):
    """A smooth maximum of the pairs' cosines, (1/t)·log((1/P)·Σ_pairs exp(t·c_ij)).

    It tends to the greatest cosine as t grows.

    ``"sum"`` omits the 1/P: then it is never below the greatest cosine. The gradient is the same:
    the pairs' softmax weights, which sum to 1, times the gradients of their cosines.

    Args:
        t: sharpness (1/temperature), 0 < t ≤ 1e6.

    Raises:
        TypeError, ValueError: for a wrong argument, naming it.

    Source: as `Gaussian`, which is t·this − t at half the t.
    """

    t: float = 40.0

    def __post_init__(self) -> None:
        self._sharpness()

    @property
    def potential(self) -> Potential:
        return Potential("log_sum_exp", self.t)

    def total(self, pair_sum: Tensor, num_pairs: int, mean: bool) -> Tensor:
        return (pair_sum - math.log(num_pairs) if mean else pair_sum) / self.t


@dataclass(frozen=True)
class Gaussian(PairEnergy):
    """The uniformity loss, log((1/P)·Σ_pairs exp(−t·r_ij²)); ``"sum"`` omits the 1/P.

    Args:
        t: inverse squared width, 0 < t ≤ 1e6.

    Raises:
        TypeError, ValueError: for a wrong argument, naming it.

    Source: Wang and Isola, "Understanding contrastive representation learning through alignment
    and uniformity on the hypersphere", ICML 2020.
    """

    t: float = 2.0

    def __post_init__(self) -> None:
        self._sharpness()

    @property
    def potential(self) -> Potential:
        return Potential("log_sum_exp", 2 * self.t)  # −t·r² = 2t·c − 2t

    def total(self, pair_sum: Tensor, num_pairs: int, mean: bool) -> Tensor:
        return (pair_sum - math.log(num_pairs) if mean else pair_sum) - 2 * self.t


@dataclass(frozen=True)
class Riesz(PairEnergy):
    """The Riesz energy, (1/P)·Σ_pairs r_ij^(−s); ``"sum"`` omits the 1/P.

    s = 1 is Coulomb's potential.

    `r_min` is 1e-6 or, for s > 4, 10^(−30/(s+1)), so that no pair's gradient overflows float32.

    Args:
        s: exponent, 0 < s ≤ 16. (For a sharper one use `LogSumExp`.)

    Raises:
        TypeError, ValueError: for a wrong argument, naming it.

    Source: Liu et al., "Learning towards minimum hyperspherical energy", NeurIPS 2018.
    """

    s: float = 1.0

    def __post_init__(self) -> None:
        s = self._number("s", "in (0, 16]")
        _require(0 < s <= 16, "s", s, "in (0, 16]")

    @property
    def r_min(self) -> float:
        return max(R_MIN, 10 ** (-30 / (self.s + 1)))

    @property
    def potential(self) -> Potential:
        return Potential("riesz", self.s, r_min=self.r_min)


@dataclass(frozen=True)
class Log(PairEnergy):
    """The logarithmic energy, −(1/P)·Σ_pairs log r_ij; ``"sum"`` omits the 1/P.

    It is the limit of Riesz for s → 0.

    Source: as `Riesz`.
    """

    @property
    def potential(self) -> Potential:
        return Potential("log")


@dataclass(frozen=True)
class Hinge(PairEnergy):
    """A hinge on the pairs' cosines, (1/P)·Σ_pairs max(0, c_ij − threshold)^p / p.

    ``"sum"`` omits the 1/P.

    p = 2 gives soft spheres, which repel in proportion to their overlap; p = 1 the plain hinge,
    whose slope is discontinuous.

    Args:
        threshold: the cosine from which pairs repel, in [−1, 1).
        power: p, 1 or 2.

    Raises:
        TypeError, ValueError: for a wrong argument, naming it.

    Source: Geissbühler et al., "Synthetic face datasets generation via latent space exploration
    from Brownian identity diffusion", 2024.
    """

    threshold: float
    power: int = 2

    def __post_init__(self) -> None:
        threshold = self._number("threshold", "in [−1, 1)")
        power = self._integer("power", "1 or 2")
        _require(-1 <= threshold < 1, "threshold", threshold, "in [−1, 1)")
        _require(power in (1, 2), "power", power, "1 or 2")

    @property
    def potential(self) -> Potential:
        return Potential("hinge", self.threshold, self.power)


NEIGHBOR_ENERGIES = (MaxCosine, ClosestPair, KoLeo)
PAIR_ENERGIES = (LogSumExp, Gaussian, Riesz, Log, Hinge)
