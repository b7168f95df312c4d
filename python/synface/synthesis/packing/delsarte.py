"""Delsarte's linear program: a bound on spherical codes, stronger than Levenshtein's in places.

Let f = 1 + Σ_{k=1}^K c_k·P_k with c_k ≥ 0, where P_k are the Gegenbauer polynomials of R^d with
P_k(1) = 1. As Σ_{i,j} f(x_i·x_j) ≥ N² for any N points, f ≤ ε on [−1, s] shows that N points whose
worst cosine is at most s have

    N ≤ f(1) + (N − 1)·ε, or N ≤ (f(1) − ε)/(1 − ε) for ε < 1.

The linear program minimizes f(1) with f ≤ 0 at some cosines. Its solution may exceed 0 between
them, and by the solver's tolerance; ε is an upper bound of it on all of [−1, s], by
`_Program.highest`, so what is returned is a bound, whatever the solver did.

Sources: Delsarte, Goethals and Seidel, Spherical codes and designs, 1977; Odlyzko and Sloane, New
bounds on the number of unit spheres that can touch a unit sphere in n dimensions, 1979.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ...common.check import check_integer, check_number
from ...common.extras import extra

DEGREE = 30  # K
PROGRAMS = 12  # linear programs at most for one cosine; 2 to 5 are enough
STEPS = 12  # cosines at most for one N; 3 to 5 are enough
MARGIN = 1e-9  # share of N by which a bound on the size is aimed below N, for rounding
ROUNDING = 1e-13  # of f, as a share of f(1): up to degree 30, float64 loses 3e-14 at most

Array = NDArray[np.float64]


def gegenbauer(cosines: Array, dim: int, degree: int) -> Array:
    """Return P_0, …, P_degree of R^dim at cosines (T,), as rows (degree + 1, T); P_k(1) = 1."""
    rows = np.empty((degree + 1, len(cosines)))
    rows[0], rows[1] = 1.0, cosines
    for k in range(1, degree):
        rows[k + 1] = (2 * k + dim - 2) * cosines * rows[k] - k * rows[k - 1]
        rows[k + 1] /= k + dim - 2
    return rows


class _Program:
    """The linear programs of one dimension and degree.

    Attributes:
        slopes: P_k'(1), k ≥ 1.
        touching: angles at which the last polynomial comes close to 0.
    """

    def __init__(self, dim: int, degree: int) -> None:
        self.dim, self.degree = dim, degree
        k = np.arange(1, degree + 1)
        self.slopes = k * (k + dim - 2) / (dim - 1)
        self.touching: Array = np.zeros(0)

    def f(self, coefficients: Array, angles: Array) -> Array:
        """Return 1 + Σ c_k·P_k at angles."""
        return 1 + coefficients @ gegenbauer(np.cos(angles), self.dim, self.degree)[1:]

    def solve(self, cosine: float) -> tuple[Array, float] | None:
        """Return the c_k of the best polynomial for a worst cosine, and ∂f(1)/∂cosine.

        Constraints are exchanged: the polynomial's maxima above 0 become constraints of the next
        program. None: the solver failed.
        """
        with extra("train", "Delsarte's linear program"):
            from scipy.optimize import linprog

        first = math.acos(cosine)
        fine = np.linspace(first, math.pi, 48 * self.degree + 1)  # π is among every 16th
        angles = np.concatenate([fine[::16], self.touching[self.touching > first]])
        tolerances = dict.fromkeys(
            ("primal_feasibility_tolerance", "dual_feasibility_tolerance"), 1e-10
        )
        coefficients, slope = np.zeros(self.degree), 0.0
        for _ in range(PROGRAMS):
            rows = gegenbauer(np.cos(angles), self.dim, self.degree)[1:].T
            one, limits = np.ones(self.degree), -np.ones(len(rows))
            found = linprog(one, rows, limits, method="highs-ds", options=tolerances)
            if found.x is None:
                return None
            coefficients = np.maximum(found.x, 0)
            total = 1 + coefficients.sum()
            f = self.f(coefficients, fine)
            peak = np.flatnonzero((f[1:-1] > f[:-2]) & (f[1:-1] >= f[2:])) + 1
            before, here, after = f[peak - 1], f[peak], f[peak + 1]
            shift = (before - after) / (2 * (before - 2 * here + after))  # a parabola's top
            peaks = fine[peak] + shift * (fine[1] - fine[0])
            at_peaks = self.f(coefficients, peaks)
            self.touching = peaks[at_peaks > -1e-6 * total]
            step = 1e-6
            rise = (self.f(coefficients, np.array([first - step]))[0] - f[0]) / step
            slope = float(-found.ineqlin.marginals[0] * rise / math.sin(first))
            if at_peaks.max(initial=-1.0) <= 1e-12 * total:
                break
            angles = np.concatenate([angles, peaks[at_peaks > 0]])
        return coefficients, slope

    def highest(self, coefficients: Array, cosine: float) -> float:
        """Return an upper bound of f on [−1, cosine], by branch and bound over the angle θ.

        P_k(cos θ) is a sum of cos jθ, j ≤ k, whose weights are not negative, so no second
        derivative of f(cos θ) exceeds that at θ = 0, which is f'(1), in absolute value. In a cell
        of width h, f is at most f'(1)·h²/8 above the larger of its values at the ends. Cells that
        may hold a higher value than the highest seen are cut in four, until h is small enough.
        """
        curvature = float(coefficients @ self.slopes)
        rounding = ROUNDING * (1 + float(coefficients.sum()))
        ends = np.linspace(math.acos(cosine), math.pi, 32 * self.degree)
        low, width, seen = ends[:-1], ends[1] - ends[0], -math.inf
        while True:
            f = self.f(coefficients, np.concatenate([low, low + width]))
            above = f.reshape(2, -1).max(0)
            seen = max(seen, float(above.max()))
            slack = curvature * width**2 / 8
            if slack <= rounding or len(low) > 100_000:
                return float(seen + slack + rounding)
            low = low[above + slack > seen]
            width /= 4
            low = (low[:, None] + width * np.arange(4)).ravel()


def size(cosine: float, dim: int, degree: int = DEGREE) -> float:
    """Return an upper bound on the number of points in R^dim whose worst cosine is ``cosine``.

    Infinity where the program finds none, as for cosines near 1.

    Args:
        cosine: in (−1, 1). dim: at least 2. degree: of the polynomials, at least 1.

    Raises:
        TypeError, ValueError: for a wrong argument.
    """
    check_number("cosine", cosine, -1, 1)
    if abs(cosine) == 1:
        raise ValueError(f"cosine must be in (-1, 1), got {cosine}")
    check_integer("dim", dim, 2)
    check_integer("degree", degree, 2)
    program = _Program(dim, degree)
    found = program.solve(float(cosine))
    if found is None:
        return math.inf
    high = max(0.0, program.highest(found[0], float(cosine)))
    return (1 + float(found[0].sum()) - high) / (1 - high) if high < 1 else math.inf


def improve(count: int, dim: int, cosine: float, degree: int = DEGREE) -> float:
    """Return a lower bound on the worst cosine of N points, at least the one given.

    Newton's method finds the cosine at which the bound on the size is N. A cosine counts only where
    its own polynomial shows that N points cannot have it.

    Args:
        cosine: a known lower bound, in (−1, 1). degree: of the polynomials.
    """
    program, best, margin = _Program(dim, degree), cosine, MARGIN
    for _ in range(STEPS):
        found = program.solve(cosine)
        if found is None or found[1] <= 0:
            break
        coefficients, slope = found
        most = 1 + float(coefficients.sum())
        most += (count - 1) * max(0.0, program.highest(coefficients, cosine))
        error = math.log(most / count)
        if error < 0:
            best = max(best, cosine)
            if error > -4 * margin:
                break
        elif error < 1e-6:  # the solver is not that exact here
            margin *= 10
        cosine = min(max(cosine - (error + margin) * most / slope, best), 1 - 1e-9)
    return best
