"""Groups of rotations that an orbit search tries, and the generators that it starts from."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .orbits import Layout, Orbits

SYMMETRIES = ("auto", "none", "antipodal", "cyclic")
LARGEST_ORDER = 24  # of the groups tried on few points
LAYOUTS = 4  # per order
# N²/p at which a step of many points takes some seconds on two cores.
CORRELATIONS = 150_000_000
# Quadratic phases are the better start from N = 28·d on, see docs/packing.md.
PHASES_FROM = 28


def check(count: int, dim: int, symmetry: str, order: int | None, most_few: int) -> None:
    """Raise ValueError if no group of the symmetry and order suits N and d."""
    if symmetry == "antipodal" and count % 2:
        raise ValueError(f"symmetry 'antipodal' needs an even count, got {count}")
    if order is None and symmetry in ("auto", "none"):
        return
    if order is not None and order > count:
        raise ValueError(f"order must be at most count = {count}, got {order}")
    if order is not None and symmetry == "antipodal" and order % 2:
        raise ValueError(f"order must be even for symmetry 'antipodal', got {order}")
    if order not in (None, 2) and symmetry == "antipodal" and count <= most_few:
        raise ValueError(
            f"order must be 2 for symmetry 'antipodal' of up to {most_few} points, got {order}"
        )
    if order is not None and symmetry == "none" and order > 1:
        raise ValueError(f"order must be 1 for symmetry 'none', got {order}")
    if count > most_few:
        many(count, dim, symmetry, order)
    elif order is not None and count % order:
        raise ValueError(
            f"order must divide count = {count} of up to {most_few} points, got {order}"
        )
    elif not few(count, dim, symmetry, order):
        raise ValueError(
            f"{symmetry!r} is no symmetry of {count} points in {dim} dimensions by a group of "
            f"order {order or f'up to {LARGEST_ORDER}'}: its rotations need more dimensions, or "
            "the order no divisor of the count"
        )


def few(count: int, dim: int, symmetry: str, order: int | None = None) -> list[Layout]:
    """Return the layouts to try on few points, the trivial group first.

    Of cyclic groups of order p, a divisor of the count, those whose characters are rational: all
    frequencies k with the same gcd(k, p) have the same number of planes, as in every automorphism
    of a lattice. Of each order the few closest to the regular representation.
    """
    found = []
    if symmetry in ("auto", "none"):
        found.append(Layout(1, dim))
    if symmetry in ("auto", "antipodal") and count % 2 == 0:
        found.append(Layout(2, 0, dim))
    if symmetry in ("auto", "cyclic"):
        orders = range(2, min(LARGEST_ORDER, count) + 1) if order is None else (order,)
        for each in orders:
            if count % each == 0:
                found += [layout for layout in _rational(dim, each) if layout not in found]
    return [layout for layout in found if order in (None, layout.order)]


def many(count: int, dim: int, symmetry: str, order: int | None = None) -> Layout:
    """Return the layout of a search with many points: every frequency about equally often.

    Args:
        count, dim: N and d.
        symmetry: "antipodal" has odd frequencies only, which makes g^(p/2) the inversion.
        order: p; None chooses it.
    """
    antipodal = symmetry == "antipodal"
    if order is None:
        order = _order(count, dim, antipodal)
    if antipodal:
        if order % 2:
            raise ValueError(f"order must be even for antipodal points, got {order}")
        spread = list(range(1, order // 2, 2))
    else:
        spread = list(range(1, (order + 1) // 2))
    signs = order % 2 == 0 and (not antipodal or order // 2 % 2 == 1)
    axes = not antipodal
    each = 2 * len(spread) + signs + axes
    rounds, rest = divmod(dim, each)
    # A fixed shuffle: neighboring frequencies alone would make neighboring images similar.
    shuffled = np.random.default_rng(order).permutation(len(spread))
    extra = [spread[i] for i in shuffled[: rest // 2]]
    if extra and not rounds and math.gcd(order, *extra) > 1 and 1 not in extra:
        extra[0] = 1  # else some images would be equal
    if rest // 2 > len(spread) or (rest % 2 and not axes and not signs):
        raise ValueError(
            f"an antipodal group of order {order} has no representation in {dim} dimensions"
        )
    planes = tuple(sorted(spread * rounds + extra))
    odd = rest % 2
    return Layout(
        order,
        (rounds + odd) if axes else 0,
        (rounds + (odd if not axes else 0)) if signs else 0,
        planes,
    )


def phases(count: int, dim: int) -> Layout | None:
    """Return the layout of quadratic phases, where they are the better start, or None.

    p is the largest prime up to d/2; the rest of the dimensions are more planes.
    """
    prime = _prime_up_to(dim // 2)
    if prime < 3 or not PHASES_FROM * dim <= count <= 4 * prime * (prime - 1):
        return None
    extra, odd = divmod(dim - 2 * prime, 2)
    frequencies = [min(k, prime - k) for k in range(1, prime)]
    more = [1 + k % (prime // 2) for k in range(extra)]
    return Layout(prime, 2 + odd, 0, tuple(sorted(frequencies + more)))


def quadratic(orbits: Orbits, count: int) -> Tensor:
    """Return generators (m, width) i^l·exp(2πi·a·x²/p)/√p, x = 0 to p − 1, for a = 1, 2, ….

    A rotation multiplies coordinate x by exp(2πi·x/p). Sums of quadratic phases are of size √p
    (Gauss), so no cosine of two of the 4p(p − 1) points exceeds 1/√p, about √(2/d).

    Source: Alltop, Complex sequences with low periodic correlations, 1980; mutually unbiased
    bases: Wootters and Fields, Optimal state-determination by mutually unbiased measurements, 1989.
    """
    order = orbits.order
    generators = -(-count // order)
    x = torch.arange(order, dtype=torch.int64, device="cpu")
    a = torch.arange(generators, dtype=torch.int64, device="cpu")[:, None] // 4 + 1
    angle = (a * (x * x % order) % order).double() * (2 * math.pi / order)
    turn = torch.arange(generators, dtype=torch.float64, device="cpu")[:, None] % 4 * (math.pi / 2)
    z = torch.polar(torch.ones_like(angle), angle + turn)
    rows = torch.zeros(generators, *orbits.shape, dtype=torch.float64, device="cpu")
    half = (order + 1) // 2
    rows[:, 0, 0, 0], rows[:, 0, 1, 0] = z[:, 0].real, z[:, 0].imag
    rows[:, 1:, 0] = torch.view_as_real(z[:, 1:half])
    # A plane that turns by −k is one that turns by k, seen from behind.
    rows[:, 1:, 1] = torch.view_as_real(z[:, half:].flip(1).conj().resolve_conj())
    return orbits.unit(rows.flatten(1)[None].to(orbits.device))[0]


def _order(count: int, dim: int, antipodal: bool) -> int:
    """Return the order p near d, or more for very many points, that wastes the fewest points."""
    # Images that share few planes are close to each other, so few dimensions bear small groups.
    larger = min(count * count // CORRELATIONS, dim * dim // 32)
    target = max(min(dim, count // 8), larger, 2)
    orders = list(range(max(2, target * 3 // 4), target + 1))
    if antipodal:  # of odd dimensions the inversion is an odd power of p/2 only
        orders = [p for p in orders if p % 4 == 2 or (p % 4 == 0 and dim % 2 == 0)] or [2]
    return min(orders, key=lambda p: (-count % p, abs(p - target)))


def _prime_up_to(number: int) -> int:
    """Return the largest prime up to a number of at least 2, or 1."""
    for candidate in range(number, 1, -1):
        if all(candidate % k for k in range(2, math.isqrt(candidate) + 1)):
            return candidate
    return 1


def _rational(dim: int, order: int) -> list[Layout]:
    """Return rational representations of the cyclic group in R^d, close to the regular one."""
    divisors = [q for q in range(order, 0, -1) if order % q == 0]
    sizes = [_totient(q) for q in divisors]
    regular = dim / order

    def choices(index: int, left: int) -> Iterator[tuple[int, ...]]:
        size = sizes[index]
        if index == len(divisors) - 1:  # q = 1, of size 1
            yield (left,)
            return
        middle = int(regular)
        for number in range(max(0, middle - 1), min(middle + 2, left // size) + 1):
            for others in choices(index + 1, left - number * size):
                yield (number, *others)

    def distance(numbers: tuple[int, ...]) -> float:
        return sum(s * (n - regular) ** 2 for s, n in zip(sizes, numbers, strict=True))

    found = []
    for numbers in sorted(choices(0, dim), key=distance):
        used = [q for q, n in zip(divisors, numbers, strict=True) if n]
        if math.lcm(*used) == order:
            number = dict(zip(divisors, numbers, strict=True))
            planes = [
                order // q * j
                for q in used
                if q > 2
                for j in range(1, (q + 1) // 2)
                if math.gcd(j, q) == 1
                for _ in range(number[q])
            ]
            found.append(Layout(order, number[1], number.get(2, 0), tuple(sorted(planes))))
        if len(found) == LAYOUTS:
            break
    return found


def _totient(number: int) -> int:
    return sum(math.gcd(k, number) == 1 for k in range(1, number + 1))
