"""Spherical codes that are known exactly: (N, d) float64 unit vectors, with their worst cosine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
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


def d_roots(dim: int) -> Tensor:
    """Return the 2d(d−1) roots of D_d, ±e_i ± e_j; those of D4 are the 24-cell's vertices."""
    rows = []
    for i, j in itertools.combinations(range(dim), 2):
        for a, b in itertools.product((-1.0, 1.0), repeat=2):
            root = [0.0] * dim
            root[i], root[j] = a, b
            rows.append(root)
    return _unit(_rows(rows))


def e7() -> Tensor:
    """Return the 126 roots of E7: those of E8 that are orthogonal to its first."""
    roots = e8()
    return _unit(roots[(roots @ roots[0]).abs() < 1e-9] @ _complement(roots[0]))


def e6() -> Tensor:
    """Return the 72 roots of E6: those of E8 that are orthogonal to two that are at 60°."""
    roots = e8()
    cosines = roots @ roots[0]
    other = roots[(cosines - 0.5).abs() < 1e-9][0]
    second = _unit((other - 0.5 * roots[0])[None])[0]
    first = _complement(roots[0])
    chosen = roots[(cosines.abs() < 1e-9) & ((roots @ other).abs() < 1e-9)]
    return _unit(chosen @ first @ _complement(_unit((second @ first)[None])[0]))


def golay() -> Tensor:
    """Return the 4096 words of the extended binary Golay code: (4096, 24) int64.

    The generator polynomial is x^11 + x^9 + x^7 + x^6 + x^5 + x + 1.
    """
    polynomial = [int(bit) for bit in "110001110101"]
    rows = torch.tensor([[0] * i + polynomial + [0] * (11 - i) for i in range(12)])
    words = torch.tensor(list(itertools.product((0, 1), repeat=12))) @ rows % 2
    return torch.cat([words, words.sum(1, keepdim=True) % 2], 1)


def leech() -> Tensor:
    """Return the 196,560 shortest vectors of the Leech lattice, times √8: (196560, 24) int64."""
    words = golay()
    rows = []
    for i, j in itertools.combinations(range(24), 2):
        for a, b in itertools.product((-4, 4), repeat=2):
            row = [0] * 24
            row[i], row[j] = a, b
            rows.append(row)
    octads = words[words.sum(1) == 8]
    signs = torch.tensor([s for s in itertools.product((-2, 2), repeat=8) if math.prod(s) > 0])
    eights = torch.zeros(len(octads), len(signs), 24, dtype=torch.int64)
    places = octads.nonzero()[:, 1].view(-1, 1, 8).expand(-1, len(signs), -1)
    eights.scatter_(2, places, signs.expand(len(octads), -1, -1))
    ones = (1 - 4 * torch.eye(24, dtype=torch.int64)) * (1 - 2 * words)[:, None]
    return torch.cat([torch.tensor(rows), eights.flatten(0, 1), ones.flatten(0, 1)])


def leech_891() -> Tensor:
    """Return the shortest Leech vectors at 60° to two that are at 60°, without those two."""
    vectors = leech()
    first, second = torch.tensor([[4, 4, *[0] * 22], [4, 0, 4, *[0] * 21]])
    chosen = vectors[(vectors @ first == 16) & (vectors @ second == 16)].double()
    basis = _complement(_unit(first[None].double())[0])
    chosen, other = chosen @ basis, second.double() @ basis
    return _unit(chosen @ _complement(_unit(other[None])[0]))


def leech_552() -> Tensor:
    """Return 276 equiangular lines: the shortest Leech vectors v with v·w = 3, where w·w = 6."""
    vectors, w = leech(), torch.tensor([5, *[1] * 23])
    return _unit(vectors[vectors @ w == 24].double() @ _complement(_unit(w[None].double())[0]))


def mclaughlin(cosine: float) -> Tensor:
    """Return the points of the (275, 22) code at 1/6 or −1/4 to its first, seen from it.

    These are (162, 21) and (112, 21).
    """
    code = derived(leech_552())
    return _unit(code[(code @ code[0] - cosine).abs() < 1e-9] @ _complement(code[0]))


def spectral(graph: Tensor) -> Tensor:
    """Return the spectral embedding of a regular graph in its least eigenvalue's space."""
    values, vectors = torch.linalg.eigh(graph.double())
    return _unit(vectors[:, (values - values[0]).abs() < 1e-6])


def blocks_77() -> Tensor:
    """Return the 77 blocks of the Steiner system S(3, 6, 22): (77, 22) int64."""
    words = golay()
    return words[(words.sum(1) == 8) & (words[:, 0] == 1) & (words[:, 1] == 1)][:, 2:]


def disjoint(blocks: Tensor) -> Tensor:
    """Return the graph in which disjoint blocks are adjacent."""
    return blocks @ blocks.T == 0


def higman_sims() -> Tensor:
    """Return the graph on 1 + 22 + 77: the point, the system's points and its blocks."""
    blocks = blocks_77()
    graph = torch.zeros(100, 100, dtype=torch.bool)
    graph[0, 1:23] = graph[1:23, 0] = True
    graph[1:23, 23:] = blocks.T == 1
    graph[23:, 1:23] = blocks == 1
    graph[23:, 23:] = disjoint(blocks)
    return graph


def hoffman_singleton() -> Tensor:
    """Return the graph of 5 pentagons P_h and 5 pentagrams Q_i; j of P_h to hi + j of Q_i."""
    graph = torch.zeros(50, 50, dtype=torch.bool)
    for h, j in itertools.product(range(5), repeat=2):
        here = 5 * h + j
        graph[here, 5 * h + (j + 1) % 5] = graph[25 + here, 25 + 5 * h + (j + 2) % 5] = True
        for i in range(5):
            graph[here, 25 + 5 * i + (h * i + j) % 5] = True
    return graph | graph.T


def petersen() -> Tensor:
    """Return the graph of the pairs of five, adjacent where they are disjoint."""
    pairs = list(itertools.combinations(range(5), 2))
    return torch.tensor([[not set(p) & set(q) for q in pairs] for p in pairs])


def nordstrom_robinson_64() -> Tensor:
    """Return the Nordstrom-Robinson code of signs, shortened twice: 64 words of length 14."""
    signs = (hadamard(16) * kerdock_signs(4)[:, None]).flatten(0, 1)
    words = torch.cat([signs, -signs])
    return _unit(words[(words[:, 0] > 0) & (words[:, 1] > 0)][:, 2:])


def two_orthoplexes() -> Tensor:
    """Return 24 points in R^7: two orthoplexes in parallel hyperplanes.

    A conference matrix of order 6 turns one against the other: all its cosines are ±1/√5 or 0.
    """
    turn = torch.zeros(6, 6, dtype=torch.float64)
    turn[0, 1:] = turn[1:, 0] = 1
    for i, j in itertools.product(range(5), repeat=2):
        turn[i + 1, j + 1] = {0: 0, 1: 1, 4: 1}.get((i - j) % 5, -1)
    cosine = 1 / (1 + 2 * 5**0.5)
    flat = orthoplex(6) * (1 - cosine) ** 0.5
    height = torch.full((12, 1), cosine**0.5, dtype=torch.float64)
    upper, lower = torch.cat([flat, height], 1), torch.cat([flat @ turn / 5**0.5, -height], 1)
    return torch.cat([upper, lower])


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
# Constructions of known codes, by (N, d); synface.bench.codes has their worst cosines.
BUILT: dict[tuple[int, int], Callable[[], Tensor]] = {
    **{(d + 1, d): partial(simplex, d) for d in (8, 16, 64)},
    **{(2 * d, d): partial(orthoplex, d) for d in (8, 16, 64)},
    (12, 3): icosahedron,
    (10, 4): lambda: spectral(petersen()),
    (24, 4): lambda: d_roots(4),
    (120, 4): cell_600,
    (16, 5): lambda: derived(derived(derived(e8()))),
    (40, 5): lambda: d_roots(5),
    (27, 6): lambda: derived(derived(e8())),
    (72, 6): e6,
    (24, 7): two_orthoplexes,
    (56, 7): lambda: derived(e8()),
    (126, 7): e7,
    (240, 8): e8,
    (64, 14): nordstrom_robinson_64,
    (288, 16): lambda: kerdock(4),
    (56, 20): lambda: spectral(disjoint(blocks_77()[blocks_77()[:, 0] == 0])),
    (50, 21): lambda: spectral(hoffman_singleton()),
    (77, 21): lambda: spectral(disjoint(blocks_77())),
    (112, 21): lambda: mclaughlin(-1 / 4),
    (162, 21): lambda: mclaughlin(1 / 6),
    (100, 22): lambda: spectral(higman_sims()),
    (275, 22): lambda: derived(leech_552()),
    (891, 22): leech_891,
    (552, 23): leech_552,
}
KERDOCK_64 = Code(4224, 64, 1 / 8, lambda: kerdock(6))
KERDOCK_256 = Code(66048, 256, 1 / 16, lambda: kerdock(8))

# Least angles in degrees of the best N points in R^3, proven.
TAMMES = {
    4: 109.4712, 5: 90.0, 6: 90.0, 7: 77.8695, 8: 74.8585, 9: 70.5288, 10: 66.1468,
    11: 63.4349, 12: 63.4349, 13: 57.1367, 14: 55.6706, 24: 43.6908,
}  # fmt: skip
