"""Repulsion energies: what `hypersphere_repulsion` can minimize.

Throughout, x̂ = x/‖x‖, r_ij = ‖x̂_i − x̂_j‖ and c_ij = x̂_i·x̂_j = 1 − r_ij²/2. Without a gallery y
the *pairs* are the P = N·(N−1)/2 unordered pairs i < j, and a point's neighbors are all others;
with one they are all P = N·M pairs (x_i, y_j), and a point's neighbors are the rows of y.

Pairs closer than `r_min` count as `r_min` apart, in their own direction. Identical points have
none: x_i (the one with the lower index, or the one in x) is pushed along the axis
k = (i + j) mod D, or the next one where |x̂_i[k]| > 0.8, and the other one the opposite way. So the
gradient of every energy is finite and, but for D = 1, no pair is stuck together.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..._check import integer, number
from ..._limits import SHARPEST

R_MIN = 1e-6
SHARPNESS = f"in (0, {SHARPEST:g}]"  # made here, for Dynamo formats no float


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


@dataclass(frozen=True)
class Energy:
    """Base class of the energies; their arguments, NumPy's numbers too, become Python's."""

    @property
    def r_min(self) -> float:
        """Pairs closer than this count as this far apart."""
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
class MaxCosine(Energy):
    """e_i = (1/k)·Σ over the k nearest neighbors j of x_i of c_ij.

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


@dataclass(frozen=True)
class ClosestPair(Energy):
    """max c_ij, the one worst pair of all (HyperFace: its least cosine distance is 1 − this).

    One number, so ``"mean"`` and ``"sum"`` are the same. Among equal pairs the one with the lowest
    i, then j, takes the gradient. The choice is piecewise constant.

    Source: Shahreza and Marcel, "HyperFace", ICLR 2025.
    """


@dataclass(frozen=True)
class KoLeo(Energy):
    """e_i = −log r_ij for the nearest neighbor j of x_i (Kozachenko–Leonenko entropy).

    ``"mean"``: (1/N)·Σ_i e_i; ``"sum"``: Σ_i e_i; ``"none"``: e (N,). The choice of neighbors is
    piecewise constant.

    Source: Sablayrolles et al., "Spreading vectors for similarity search", ICLR 2019.
    """


# ---- of all pairs --------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogSumExp(Energy):
    """(1/t)·log((1/P)·Σ_pairs exp(t·c_ij)): tends to the worst cosine as t grows.

    ``"sum"`` leaves the 1/P out: then it is never below the worst cosine. The gradient is the same:
    the pairs' softmax weights, which sum to 1, on the gradients of their cosines.

    Args:
        t: sharpness (1/temperature), 0 < t ≤ 1e6.

    Raises:
        TypeError, ValueError: for a wrong argument, naming it.

    Source: as `Gaussian`, which is t·this − t at half the t.
    """

    t: float = 40.0

    def __post_init__(self) -> None:
        self._sharpness()


@dataclass(frozen=True)
class Gaussian(Energy):
    """log((1/P)·Σ_pairs exp(−t·r_ij²)): the uniformity loss; ``"sum"`` leaves the 1/P out.

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


@dataclass(frozen=True)
class Riesz(Energy):
    """(1/P)·Σ_pairs r_ij^(−s); ``"sum"`` leaves the 1/P out. s = 1 is Coulomb's potential.

    `r_min` is 1e-6 or, for s > 4, 10^(−30/(s+1)): no pair's gradient leaves float32's range.

    Args:
        s: exponent, 0 < s ≤ 16. (For a sharper one take `LogSumExp`.)

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


@dataclass(frozen=True)
class Log(Energy):
    """−(1/P)·Σ_pairs log r_ij; ``"sum"`` leaves the 1/P out. The limit of Riesz for s → 0.

    Source: as `Riesz`.
    """


@dataclass(frozen=True)
class Hinge(Energy):
    """(1/P)·Σ_pairs max(0, c_ij − threshold)^p / p; ``"sum"`` leaves the 1/P out.

    p = 2 gives soft spheres, which repel in proportion to how far they overlap; p = 1 the plain
    hinge, whose slope jumps.

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


NEIGHBOR_ENERGIES = (MaxCosine, ClosestPair, KoLeo)
PAIR_ENERGIES = (LogSumExp, Gaussian, Riesz, Log, Hinge)
