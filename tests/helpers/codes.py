"""Spherical codes that are known exactly: (N, d) float64 unit vectors, with their worst cosine."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

GOLDEN = (1 + 5**0.5) / 2


class Code(NamedTuple):
    """points() builds it; ``worst`` is the largest cosine between two of its points."""

    count: int
    dim: int
    worst: float
    points: Callable[[], Tensor]


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def _rows(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def simplex(dim: int) -> Tensor:
    """d+1 points, all cosines −1/d: the unit vectors of R^(d+1) seen from their mean."""
    centered = torch.eye(dim + 1, dtype=torch.float64) - 1 / (dim + 1)
    return _unit(centered @ _complement(torch.ones(dim + 1, dtype=torch.float64)))


def orthoplex(dim: int) -> Tensor:
    """Return the points ±e_i."""
    eye = torch.eye(dim, dtype=torch.float64)
    return torch.cat([eye, -eye])


def icosahedron() -> Tensor:
    """Return the cyclic permutations of (0, ±1, ±φ)."""
    face = [(0.0, a, b * GOLDEN) for a in (-1, 1) for b in (-1, 1)]
    return _unit(_rows([p[i:] + p[:i] for p in face for i in range(3)]))


def cell_600() -> Tensor:
    """Return ±e_i, (±1/2)^4 and the even permutations of (±φ, ±1, ±1/φ, 0)/2."""
    even = [p for p in itertools.permutations(range(4)) if _inversions(p) % 2 == 0]
    tesseract = list(itertools.product((-0.5, 0.5), repeat=4))
    golden = [
        [(a * GOLDEN / 2, b / 2, c / GOLDEN / 2, 0.0)[i] for i in p]
        for p in even
        for a, b, c in itertools.product((-1, 1), repeat=3)
    ]
    return torch.cat([orthoplex(4), _rows(tesseract), _rows(golden)])


def e8() -> Tensor:
    """Return the 240 roots: (±1, ±1, 0⁶) and (±1/2)⁸ with an even number of minus signs."""
    short = []
    for i, j in itertools.combinations(range(8), 2):
        for a, b in itertools.product((-1.0, 1.0), repeat=2):
            root = [0.0] * 8
            root[i], root[j] = a, b
            short.append(root)
    long = [s for s in itertools.product((-0.5, 0.5), repeat=8) if sum(x < 0 for x in s) % 2 == 0]
    return _unit(torch.cat([_rows(short), _rows(long)]))


def derived(code: Tensor) -> Tensor:
    """Return the derived code: the first point's neighbors, seen from it, in d − 1 dimensions.

    E8 gives (56, 7), that (27, 6), that (16, 5).
    """
    cosines = code[1:] @ code[0]
    near = code[1:][cosines > cosines.max() - 1e-9]
    return _unit(near @ _complement(code[0]))


def kerdock_signs(m: int) -> Tensor:
    """Return (2^(m−1), 2^m) float64 signs s_u, m even: the product of any two of them is bent.

    s_u(x, e) = (−1)^(Q(ux) + e·Tr(ux)) for x in GF(2^(m−1)), e a bit, and
    Q(x) = Σ_{i=1}^{(m−2)/2} Tr(x^(1+2^i)).
    Source: Kerdock, A class of low-rate nonlinear binary codes, 1972.
    """
    n = m - 1
    modulus = {3: 0b1011, 5: 0b100101, 7: 0b10000011}[n]  # irreducible over GF(2)

    def times(a: int, b: int) -> int:
        product = 0
        for bit in range(n):
            if b >> bit & 1:
                product ^= a << bit
        for bit in reversed(range(n, 2 * n - 1)):
            if product >> bit & 1:
                product ^= modulus << (bit - n)
        return product

    def frobenius(a: int, i: int) -> int:
        for _ in range(i):
            a = times(a, a)
        return a

    def trace(a: int) -> int:
        total = 0
        for i in range(n):
            total ^= frobenius(a, i)
        return total  # 0 or 1

    traces = [trace(a) for a in range(2**n)]
    q = [sum(traces[times(a, frobenius(a, i))] for i in range(1, m // 2)) for a in range(2**n)]
    bits = [
        [q[times(u, x)] + e * traces[times(u, x)] for e in (0, 1) for x in range(2**n)]
        for u in range(2**n)
    ]
    return 1.0 - 2.0 * (torch.tensor(bits) % 2).double()


def hadamard(dim: int) -> Tensor:
    """Sylvester's matrix of signs: (−1)^(u·x)."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < dim:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix


def kerdock(m: int) -> Tensor:
    """Return 2^m(2^m + 2) points in R^(2^m): ± of 2^(m−1) + 1 mutually unbiased bases."""
    dim = 2**m
    bases = hadamard(dim) * kerdock_signs(m)[:, None] / dim**0.5
    half = torch.cat([torch.eye(dim, dtype=torch.float64), bases.flatten(0, 1)])
    return torch.cat([half, -half])


def _inversions(permutation: tuple[int, ...]) -> int:
    return sum(a > b for a, b in itertools.combinations(permutation, 2))


def _complement(normal: Tensor) -> Tensor:
    """Return an orthonormal basis (d, d−1) of the complement of a vector."""
    start = torch.cat([normal[:, None], torch.eye(len(normal), dtype=torch.float64)], 1)
    return torch.linalg.qr(start)[0][:, 1:]


SMALL = {
    "simplex": Code(9, 8, -1 / 8, lambda: simplex(8)),
    "orthoplex": Code(16, 8, 0.0, lambda: orthoplex(8)),
    "icosahedron": Code(12, 3, 5**-0.5, icosahedron),
    "16 in 5": Code(16, 5, 1 / 5, lambda: derived(derived(derived(e8())))),
    "27 in 6": Code(27, 6, 1 / 4, lambda: derived(derived(e8()))),
    "56 in 7": Code(56, 7, 1 / 3, lambda: derived(e8())),
    "600-cell": Code(120, 4, GOLDEN / 2, cell_600),
    "E8": Code(240, 8, 1 / 2, e8),
    "Kerdock 16": Code(288, 16, 1 / 4, lambda: kerdock(4)),
}
KERDOCK_64 = Code(4224, 64, 1 / 8, lambda: kerdock(6))
KERDOCK_256 = Code(66048, 256, 1 / 16, lambda: kerdock(8))

# Least angles in degrees of the best N points in R^3, proven.
TAMMES = {
    4: 109.4712, 5: 90.0, 6: 90.0, 7: 77.8695, 8: 74.8585, 9: 70.5288, 10: 66.1468,
    11: 63.4349, 12: 63.4349, 13: 57.1367, 14: 55.6706, 24: 43.6908,
}  # fmt: skip
