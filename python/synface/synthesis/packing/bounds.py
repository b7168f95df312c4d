"""Lower bounds on the worst cosine of N points on the sphere of R^d, and that of random points.

Any N unit vectors include two with a cosine of at least `best`: a packing's gap to it limits what
could still be gained, and the gap to `random_worst` is the gain of packing.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np

from ...common.extras import extra
from .delsarte import DEGREE, gegenbauer, improve

__all__ = [
    "Bound", "best", "certificate", "delsarte", "fejes_toth", "levenshtein",
    "random_nearest_cdf", "random_worst", "rankin", "test_functions", "welch",
]  # fmt: skip
MOST_DEGREE = 2**14  # of Levenshtein's bound: a time of some tenths of a second
MOST_MOMENTS = 10**6  # of Welch's
STATISTICS = "statistics of points on a sphere"  # for error messages


class Bound(NamedTuple):
    """A lower bound on the worst cosine (the largest between any two points), and its name."""

    cosine: float
    name: str


def _check(count: int, dim: int) -> None:
    """Raise TypeError or ValueError unless both are integers in [2, 2^63)."""
    for name, value in (("count", count), ("dim", dim)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if value < 2:
            raise ValueError(f"{name} must be at least 2, got {value}")
        if value >= 2**63:
            raise ValueError(f"{name} must be less than 2^63, got {value}")


def best(count: int, dim: int) -> Bound:
    """Return the highest of this module's bounds on the worst cosine of ``count`` points.

    `welch` is not included, since it bounds absolute cosines. In the plane the bound is attained.

    Raises:
        TypeError, ValueError: unless both are integers in [2, 2^63); so do all functions here.
    """
    _check(count, dim)
    if dim == 2:
        return Bound(math.cos(2 * math.pi / count), "regular polygon")
    bounds = [
        Bound(rankin(count, dim), "Rankin"),
        Bound(levenshtein(count, dim), "Levenshtein"),
    ]
    if dim == 3 and count > 2:
        bounds.append(Bound(fejes_toth(count), "Fejes Tóth"))
    return max(bounds, key=lambda bound: bound.cosine)


def certificate(count: int, dim: int, *, antipodal: bool = False) -> list[Bound]:
    """Return all bounds on the worst cosine of ``count`` points, the highest first.

    Beside those of `best` there is `delsarte` where it is higher than Levenshtein's, which may take
    some tenths of a second.

    Args:
        antipodal: add `welch` for the N/2 lines through the points ±x. It holds for sets with −x
            for each x, not for all points, and only they may have it as the first.

    Raises:
        TypeError, ValueError: as `best`, and for an odd count with ``antipodal``.
    """
    _check(count, dim)
    bounds = [Bound(rankin(count, dim), "Rankin")]
    if dim == 2:
        bounds.append(Bound(math.cos(2 * math.pi / count), "regular polygon"))
    else:
        bounds.append(Bound(levenshtein(count, dim), "Levenshtein"))
        if dim == 3 and count > 2:
            bounds.append(Bound(fejes_toth(count), "Fejes Tóth"))
        if (found := delsarte(count, dim)) > bounds[1].cosine:
            bounds.append(Bound(found, "Delsarte's linear program"))
    if antipodal:
        if count % 2:
            raise ValueError(f"count must be even for antipodal points, got {count}")
        if count > 2:
            bounds.append(Bound(welch(count // 2, dim), "Welch, of lines"))
    return sorted(bounds, key=lambda bound: -bound.cosine)


def rankin(count: int, dim: int) -> float:
    """Return Rankin's bound: −1/(N−1) up to N = d+1, then 0.

    The simplex attains the former, the orthoplex the latter up to N = 2d.

    Source: Rankin, The closest packing of spherical caps in n dimensions, 1955.
    """
    _check(count, dim)
    return -1 / (count - 1) if count <= dim + 1 else 0.0


def welch(count: int, dim: int) -> float:
    """Return Welch's lower bound on the largest *absolute* cosine: for lines, not for points.

    max_k ((N·m_k − 1)/(N − 1))^(1/2k), where m_k = Π_{i<k} (2i+1)/(d+2i) is the mean of cos^2k over
    the sphere: Welch's argument with the moments of real vectors, which are higher than those of
    complex ones from k = 2 on. Points can do better: the orthoplex's worst cosine is 0. The maximum
    is over k up to a million, which leaves a bound.

    Source: Welch, Lower bounds on the maximum cross correlation of signals, 1974; Sidelnikov, 1974.
    """
    _check(count, dim)
    bound, moment, k = 0.0, 1.0, 0
    while k < MOST_MOMENTS:
        moment *= (2 * k + 1) / (dim + 2 * k)
        k += 1
        if count * moment <= 1:  # moments fall with k
            break
        bound = max(bound, ((count * moment - 1) / (count - 1)) ** (1 / (2 * k)))
    return bound


def fejes_toth(count: int) -> float:
    """Return Fejes Tóth's bound for N ≥ 3 points in R³, attained for N = 3, 4, 6, 12.

    It is (cot²ω − 1)/2 with ω = N/(N−2)·π/6.

    Source: Fejes Tóth, Über die Abschätzung des kürzesten Abstandes zweier Punkte eines auf einer
    Kugelfläche liegenden Punktsystems, 1943.
    """
    _check(count, 3)
    if count == 2:
        raise ValueError("count must be at least 3, got 2")
    omega = count / (count - 2) * math.pi / 6
    return (math.tan(omega) ** -2 - 1) / 2


def levenshtein(count: int, dim: int) -> float:
    """Return the cosine s at which Levenshtein's bound on the size of a code, L(d, s), reaches N.

    With P_i the Gegenbauer polynomials of R^d, P_i(1) = 1:

        L_{2k−1}(s) = C(k+d−3, k−1) · [(2k+d−3)/(d−1) − (P_{k−1} − P_k)/((1−s)·P_k)]
        L_{2k}(s) = C(k+d−2, k) · [(2k+d−1)/(d−1) − (1+s)(P_k − P_{k+1})/((1−s)(P_k + P_{k+1}))]

    each on an interval that ends at the largest zeros of two Jacobi polynomials. L_τ ends, and
    L_{τ+1} begins, at the least size of a spherical (τ+1)-design.

    Memory and time: O(√N) in R³, constant for d ≫ log N. For more points than L_τ of degree 2^14
    reaches (6.7e7 in R³, 1.8e11 in R⁴), the bound of as many as it reaches, which is lower.
    Source: Levenshtein, Universal bounds for codes and designs, 1998, eq. 5.65 to 5.70.
    """
    _check(count, dim)
    if dim == 2:
        return math.cos(2 * math.pi / count)
    degree = _levenshtein_degree(count, dim)
    # degree τ = 2k−1 begins at the (1,1) zero of k−1 and ends at the (1,0) zero of k; 2k follows.
    low = _interval_end(dim, degree - 1)
    high = _interval_end(dim, degree)
    for _ in range(100):
        middle = (low + high) / 2
        if _levenshtein_size(dim, degree, middle) < count:
            low = middle
        else:
            high = middle
    return low


@lru_cache(maxsize=4096)
def delsarte(count: int, dim: int) -> float:
    """Return the bound of Delsarte's linear program with polynomials of degree 30 at most.

    It is Levenshtein's bound unless a polynomial improves on that, which `test_functions` decides
    in a millisecond, without a linear program. In 48 dimensions and more none does up to a million
    points. Where one does, the result is found in some tenths of a second, to 1e-7 or better, and
    remembered.

    Source: see `synface.synthesis.packing.delsarte`.
    """
    found = levenshtein(count, dim)
    if dim == 2 or count <= 2 * dim:  # the polygon is optimal, and so is Rankin's bound
        return found
    if _levenshtein_degree(count, dim) >= DEGREE:  # up to it all test functions are 0
        return found
    if min(test_functions(count, dim, DEGREE)) > -1e-9 / count:
        return found
    return improve(count, dim, found)


def test_functions(count: int, dim: int, degree: int) -> list[float]:
    """Return Boyvalenkov's test functions Q_j, j ≤ degree, at Levenshtein's bound.

    Q_j = 1/N + Σ_i ρ_i·P_j(α_i) with the nodes α and weights ρ of Levenshtein's quadrature. A
    polynomial of degree up to K improves on the bound if, and only if, some Q_j with j ≤ K is
    negative; up to the bound's own degree they are 0.

    Source: Boyvalenkov, Danev and Bumova, Upper bounds on the minimum distance of spherical codes,
    1996.
    """
    nodes, weights = _quadrature(count, dim)
    return [float(q) for q in gegenbauer(nodes, dim, degree)[1:] @ weights]


def _quadrature(count: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes and weights of Levenshtein's quadrature: 1, of weight 1/N, the bound s, others.

    It is Gauss' for the weight (1−t)·w, or (1−t²)·w for an even degree, with a node fixed at s.
    """
    with extra("train", STATISTICS):
        from scipy.linalg import eigh_tridiagonal

    degree = _levenshtein_degree(count, dim)
    s = levenshtein(count, dim)
    diagonal, squared = _jacobi(dim, degree)
    rest = 0.0
    for entry, beside in zip(diagonal[:-1], squared, strict=True):
        rest = beside / (s - entry - rest)
    diagonal[-1] = s - rest  # Golub: s is now an eigenvalue
    nodes, vectors = eigh_tridiagonal(diagonal, np.sqrt(squared))
    odd = degree % 2 == 1
    weights = vectors[0] ** 2 / (1 - nodes) * (1 if odd else (1 - 1 / dim) / (1 + nodes))
    rest, moment = 1 - weights.sum(), weights @ nodes
    if odd:
        return np.append(nodes, 1), np.append(weights, rest)
    ends = [(rest + moment) / 2, (rest - moment) / 2]  # of −1 and 1
    return np.append(nodes, [-1, 1]), np.append(weights, ends)


def _design_size(dim: int, strength: int) -> int:
    """Return the least size of a spherical design (Delsarte, Goethals and Seidel, 1977)."""
    k = strength // 2
    if strength % 2:
        return 2 * math.comb(dim + k - 1, k)
    return math.comb(dim + k - 1, k) + math.comb(dim + k - 2, k - 1) if k else 1


def _levenshtein_degree(count: int, dim: int) -> int:
    """Return τ, for which L_τ reaches N, or `MOST_DEGREE`."""
    most = 2
    while most < MOST_DEGREE and _design_size(dim, most) <= count:
        most *= 2
    return 1 + bisect_right(range(2, most + 1), count, key=partial(_design_size, dim))


def _interval_end(dim: int, degree: int) -> float:
    """Return the end of L_degree: the largest zero of Jacobi's P_k^(1,0), P_k^(1,1) if even.

    Both parameters are raised by (d−3)/2; k = ⌈degree/2⌉.
    """
    with extra("train", STATISTICS):
        from scipy.linalg import eigh_tridiagonal

    if degree == 0:
        return -1.0
    diagonal, squared = _jacobi(dim, degree)
    k = len(diagonal)
    if k == 1:
        return float(diagonal[0])
    zeros = eigh_tridiagonal(
        diagonal, np.sqrt(squared), eigvals_only=True, select="i", select_range=(k - 1, k - 1)
    )
    return float(zeros[0])


def _jacobi(dim: int, degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Return diagonal (k,) and squared off-diagonal (k−1,) of the Jacobi matrix of L_degree.

    Its eigenvalues are the zeros of the polynomial that `_interval_end` names.
    """
    k = (degree + 1) // 2
    a = 1 + (dim - 3) / 2
    b = (1 - degree % 2) + (dim - 3) / 2
    i = np.arange(k, dtype=np.float64)
    s = 2 * i + a + b
    diagonal = (b - a) * (b + a) / (s * (s + 2))
    i, s = i[1:], s[1:]
    return diagonal, 4 * i * (i + a) * (i + b) * (i + a + b) / (s**2 * (s + 1) * (s - 1))


def _levenshtein_size(dim: int, degree: int, s: float) -> float:
    """Compute L_degree(dim, s)."""
    k = (degree + 1) // 2
    before, here = 1.0, s  # P_0, P_1
    for i in range(1, k):
        before, here = here, ((2 * i + dim - 2) * s * here - i * before) / (i + dim - 2)
    if degree % 2:
        ratio = (before - here) / ((1 - s) * here)
        return math.comb(k + dim - 3, k - 1) * ((2 * k + dim - 3) / (dim - 1) - ratio)
    after = ((2 * k + dim - 2) * s * here - k * before) / (k + dim - 2)
    ratio = (1 + s) * (here - after) / ((1 - s) * (here + after))
    return math.comb(k + dim - 2, k) * ((2 * k + dim - 1) / (dim - 1) - ratio)


def _cosine_of_tail(probability: np.ndarray, dim: int) -> np.ndarray:
    """Return the cosine that a random pair exceeds with a given probability."""
    with extra("train", STATISTICS):
        from scipy.special import betaincinv

    half = (dim - 1) / 2  # (1 − cos)/2 of two random points is Beta(half, half)
    return 1 - 2 * betaincinv(half, half, probability)


def random_worst(count: int, dim: int) -> float:
    """Return the expected worst cosine of ``count`` points drawn uniformly and independently.

    The N(N−1)/2 cosines are pairwise independent and are treated as independent:
    E = ∫₀¹ Q(u) du over the quantiles of their maximum, by the midpoint rule.
    """
    _check(count, dim)
    quantile = (np.arange(4096) + 0.5) / 4096
    pairs = count * (count - 1) / 2
    return float(_cosine_of_tail(-np.expm1(np.log(quantile) / pairs), dim).mean())


def random_nearest_cdf(cosine: np.ndarray, count: int, dim: int) -> np.ndarray:
    """Return P(a random point's nearest neighbor has at most this cosine), among N random points.

    It is exact: the other N−1 are independent given the point.
    """
    with extra("train", STATISTICS):
        from scipy.special import betainc

    _check(count, dim)
    half = (dim - 1) / 2
    tail = betainc(half, half, (1 - np.clip(cosine, -1, 1)) / 2)
    return np.exp((count - 1) * np.log1p(-np.minimum(tail, 1 - 1e-16)))
