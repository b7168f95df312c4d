"""Table of the best known spherical codes: N points in d dimensions and their worst cosine.

The cosines are exact to a few units of float64's last digit. Those without a formula are of codes
whose contacts were solved by Newton's method; they agree with the tables cited.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class KnownCode:
    """A best known spherical code.

    Attributes:
        count, dim: number of points N, dimension d.
        cosine: the worst cosine, the least that is known.
        source: what the code is, and who found it or proved it optimal.
    """

    count: int
    dim: int
    cosine: float
    source: str


_SIMPLEX = "simplex; optimal (Rankin 1955)"
_ORTHOPLEX = "orthoplex; optimal (Rankin 1955)"
_SLOANE = "Sloane, Hardin and Smith's tables of spherical codes"
_SHARP = "optimal (Levenshtein 1992; Cohn and Kumar 2007, table 1)"
_GRAPH = "graph, in the space of its least eigenvalue; optimal"
_SDP = "Cohn, de Laat and Leijenhorst 2024"
_ROOTS = "the best known kissing configuration (Conway and Sloane 1999)"
_UNIVERSAL = "conjectured universally optimal (Ballinger et al. 2009)"

CODES = (
    # Tammes' problem
    KnownCode(7, 3, 0.2101383127306032, "optimal (Schütte and van der Waerden 1951)"),
    KnownCode(8, 3, (8**0.5 - 1) / 7, "optimal (Schütte and van der Waerden 1951)"),
    KnownCode(9, 3, 1 / 3, "optimal (Schütte and van der Waerden 1951)"),
    KnownCode(10, 3, 0.4043943252162508, "optimal (Danzer 1986)"),
    KnownCode(11, 3, 5**-0.5, "icosahedron without a vertex; optimal (Danzer 1986)"),
    KnownCode(12, 3, 5**-0.5, "icosahedron; optimal (Fejes Tóth 1943)"),
    KnownCode(13, 3, 0.5426364868296385, "optimal (Musin and Tarasov 2012)"),
    KnownCode(14, 3, 0.5639503003605053, "optimal (Musin and Tarasov 2015)"),
    KnownCode(15, 3, 0.5926059029250738, _SLOANE),
    KnownCode(16, 3, 0.6122946164826967, _SLOANE),
    KnownCode(17, 3, 0.6280944150700216, _SLOANE),
    KnownCode(18, 3, 0.6486958322231166, _SLOANE),
    KnownCode(19, 3, 0.6731168875600512, _SLOANE),
    KnownCode(20, 3, 0.6764771381296515, _SLOANE),
    KnownCode(21, 3, 0.6994984310663772, _SLOANE),
    KnownCode(22, 3, 0.7103062585796905, _SLOANE),
    KnownCode(23, 3, 0.7228469848683998, _SLOANE),
    KnownCode(24, 3, 0.7230784683335085, "snub cube; optimal (Robinson 1961)"),
    # few dimensions
    KnownCode(10, 4, 1 / 6, f"Petersen {_GRAPH} (Bachoc and Vallentin 2009)"),
    KnownCode(24, 4, 1 / 2, f"24-cell, D4's roots; {_ROOTS}"),
    KnownCode(120, 4, (1 + 5**0.5) / 4, "600-cell; optimal (Böröczky 1978)"),
    KnownCode(16, 5, 1 / 5, f"derived from E8 three times; {_SHARP}"),
    KnownCode(40, 5, 1 / 2, f"D5's roots; {_ROOTS}"),
    KnownCode(27, 6, 1 / 4, f"derived from E8 twice; {_SHARP}"),
    KnownCode(72, 6, 1 / 2, f"E6's roots; {_ROOTS}"),
    KnownCode(24, 7, 1 / (1 + 20**0.5), "two orthoplexes in parallel hyperplanes (Wang 2009)"),
    KnownCode(56, 7, 1 / 3, f"derived from E8; {_SHARP}"),
    KnownCode(126, 7, 1 / 2, f"E7's roots; {_ROOTS}"),
    KnownCode(9, 8, -1 / 8, _SIMPLEX),
    KnownCode(16, 8, 0.0, _ORTHOPLEX),
    KnownCode(240, 8, 1 / 2, f"E8's roots; {_SHARP}"),
    # more dimensions
    KnownCode(40, 10, 1 / 6, _UNIVERSAL),
    KnownCode(64, 14, 1 / 7, f"Nordstrom-Robinson code shortened twice; {_UNIVERSAL}"),
    KnownCode(17, 16, -1 / 16, _SIMPLEX),
    KnownCode(32, 16, 0.0, _ORTHOPLEX),
    KnownCode(288, 16, 1 / 4, f"Kerdock; optimal ({_SDP})"),
    KnownCode(56, 20, 1 / 15, f"Gewirtz {_GRAPH} ({_SDP})"),
    KnownCode(50, 21, 1 / 21, f"Hoffman-Singleton {_GRAPH} ({_SDP})"),
    KnownCode(77, 21, 1 / 12, f"Mesner's M22 {_GRAPH} ({_SDP})"),
    KnownCode(112, 21, 1 / 9, f"isotropic subspaces, q = 3; {_SHARP}"),
    KnownCode(162, 21, 1 / 7, f"derived from the McLaughlin graph's; {_SHARP}"),
    KnownCode(100, 22, 1 / 11, f"Higman-Sims graph's; {_SHARP}"),
    KnownCode(275, 22, 1 / 6, f"McLaughlin graph's; {_SHARP}"),
    KnownCode(891, 22, 1 / 4, f"derived from the Leech lattice's twice; {_SHARP}"),
    KnownCode(552, 23, 1 / 5, f"276 equiangular lines; {_SHARP}"),
    KnownCode(325, 52, 1 / 16, f"isotropic subspaces, q = 4; {_SHARP}"),
    KnownCode(65, 64, -1 / 64, _SIMPLEX),
    KnownCode(128, 64, 0.0, _ORTHOPLEX),
)  # fmt: skip


def select(codes: Sequence[str] = (), dim: int | None = None) -> list[KnownCode]:
    """Return the codes of the table that are named, or those of a dimension, or all.

    Args:
        codes: such as "24,4" for 24 points in 4 dimensions.
        dim: keep the codes of this dimension only.

    Raises:
        ValueError: for a code or dimension that the table lacks, saying what it has, and for
            another form.
    """
    found = []
    table = {(code.count, code.dim): code for code in CODES}
    for text in codes:
        parts = [part.strip() for part in text.split(",")]
        if len(parts) != 2 or not all(p.isascii() and p.isdigit() and len(p) < 10 for p in parts):
            raise ValueError(f"--code must be N,d such as 24,4, got {text[:80]!r}")
        count, d = map(int, parts)
        if (count, d) not in table:
            there = ", ".join(str(code.count) for code in CODES if code.dim == d)
            known = f"{there} points" if there else "none"
            raise ValueError(f"--code {count},{d} is not in the table; of {d} dimensions: {known}")
        if table[count, d] not in found:
            found.append(table[count, d])
    found = found if codes else list(CODES)
    if dim is not None:
        dims = sorted({code.dim for code in found})
        found = [code for code in found if code.dim == dim]
        if not found:
            there = ", ".join(map(str, dims))
            raise ValueError(f"--dim must be a dimension of the codes, {there}, got {dim}")
    return found
