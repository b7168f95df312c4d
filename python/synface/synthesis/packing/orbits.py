"""Orbit codes: generators and all their images under a cyclic group of rotations.

A rotation g of order p splits R^d into axes that it keeps or inverts and planes that it turns by
2πk/p, k being the plane's *frequency*. With a plane's two coordinates as one complex number z, the
cosine of x and g^a·y is Σ_planes Re(x·conj(y)·e^{−2πika/p}) plus the axes' part: the cosines of the
m·p points are m×m Fourier transforms of length p, and so is their gradient. A step costs N²/p
numbers instead of N²·d multiplications.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 1 << 20  # correlations computed together: they stay in the cache of a CPU
GPU_BLOCK = 1 << 25
NARROW = 3  # planes of a frequency up to which products are taken one after another
SHORT = 64  # transforms up to this length are matrix products, which are faster


class Layout(NamedTuple):
    """A cyclic group of rotations of R^d: its order and how it acts.

    Attributes:
        order: p ≥ 1.
        axes: number of axes that the rotation keeps.
        signs: number of axes that it inverts; 0 where p is odd.
        planes: frequency k of each plane, 0 < k < p/2.
    """

    order: int
    axes: int
    signs: int = 0
    planes: tuple[int, ...] = ()

    @property
    def dim(self) -> int:
        """The dimension d of the space."""
        return self.axes + self.signs + 2 * len(self.planes)

    def counts(self) -> dict[int, int]:
        """Return the number of axes or planes of each frequency; an inverted axis has p/2."""
        found = {0: self.axes, **({self.order // 2: self.signs} if self.signs else {})}
        for frequency in self.planes:
            found[frequency] = found.get(frequency, 0) + 1
        return found


class Orbits:
    """Several orbit codes whose groups have one order: cosines, gradients, points.

    Generators are (codes, m, ``width``) float64 rows of unit length: real and imaginary parts of
    each frequency's coordinates, padded with zeros to the same number for each frequency.

    Args:
        layouts: the group of each code, all of one order and dimension.
        device: the device to compute on.

    Memory: of a step, some ten arrays of 2^20 correlations (on a GPU 2^25), or of m·p if that is
    more.
    """

    def __init__(self, layouts: Sequence[Layout], device: torch.device) -> None:
        self.order, self.dim, self.device = layouts[0].order, layouts[0].dim, device
        counts = [layout.counts() for layout in layouts]
        used = sorted({k for each in counts for k, n in each.items() if n > 0})
        most = max(n for each in counts for n in each.values())
        self.shape = (len(used), most, 2 if self.order > 2 else 1)
        self.width = math.prod(self.shape)
        exists = torch.zeros(len(layouts), *self.shape, dtype=torch.float64, device="cpu")
        for code, each in enumerate(counts):
            for row, k in enumerate(used):
                parts = 2 if 0 < 2 * k < self.order else 1
                exists[code, row, : each.get(k, 0), :parts] = 1
        self.exists = exists.flatten(1).to(device)  # (codes, width)
        self.used = torch.tensor(used, dtype=torch.int64, device=device)
        # An inverse transform of real numbers counts each frequency between 0 and p/2 twice.
        twice = (self.used > 0) & (2 * self.used < self.order)
        self.weights = torch.where(twice, 0.5, 1.0).double()
        self.tables: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def unit(self, rows: Tensor) -> Tensor:
        """Return rows (codes, m, width) with padding set to zero and unit length."""
        rows = rows * self.exists[:, None]
        return rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True)

    def from_points(self, points: Tensor, code: int = 0) -> Tensor:
        """Return the generators (m, width) of one code whose first images are points (m, d)."""
        rows = torch.zeros(len(points), self.width, dtype=torch.float64, device=self.device)
        rows[:, self.exists[code] > 0] = points.double()
        return rows

    def points(
        self, generators: Tensor, code: int = 0, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """Return the points (m·p, d) of one code (m, width): all images of the first, and so on."""
        exists = self.exists[code] > 0
        angles = self._angles()[..., None]  # (p, frequencies, 1)
        cosine, sine = angles.cos(), angles.sin()
        points = generators.new_empty((len(generators) * self.order, self.dim), dtype=dtype)
        images = points.split(self.order)
        for part, image in zip(generators.reshape(-1, *self.shape), images, strict=True):
            turned = [part[..., 0] * cosine]
            if self.order > 2:
                turned = [
                    part[..., 0] * cosine - part[..., 1] * sine,
                    part[..., 0] * sine + part[..., 1] * cosine,
                ]
            image.copy_(torch.stack(turned, -1).flatten(1)[:, exists])
        return points

    def gradient(self, generators: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the gradient of each code's log Σ exp(t·cosine), not projected, divided by 2t.

        Args:
            generators: (codes, m, width) float64.
            t: (codes,) sharpness.
            dtype: dtype of the computation; its result is float64.
        """
        z = self._spectrum(generators, dtype)
        sharpness = t.to(dtype)[:, None, None, None]
        total = torch.zeros(len(z), dtype=torch.float64, device=self.device)
        sums, shift = torch.zeros_like(z), torch.full_like(total, -math.inf)
        for begin, end in self._blocks(z):
            cosines = self._cosines(z, begin, end)
            most = torch.maximum(shift, cosines.amax((1, 2, 3)).double())
            if begin > 0:
                shrink = (t * (shift - most)).exp()
                total *= shrink
                sums *= shrink.to(dtype)[:, None, None, None]
            shift, rows = most, end - begin
            weights = cosines.sub_(most.to(dtype)[:, None, None, None]).mul_(sharpness).exp_()
            within = weights[:, :, :rows].sum((1, 2, 3), dtype=torch.float64)
            total += within + 2 * weights[:, :, rows:].sum((1, 2, 3), dtype=torch.float64)
            spectrum = self._to_frequency(weights)
            sums[:, begin:end] += _applied(spectrum, z[:, begin:])
            if end < z.shape[1]:  # the pairs' other points
                across = spectrum[:, :, rows:].transpose(1, 2).conj()
                sums[:, end:] += _applied(across, z[:, begin:end])
        real = sums if self.order <= 2 else torch.view_as_real(sums)
        gradient = real.reshape(generators.shape).double() / total[:, None, None]
        return gradient * self.exists[:, None]

    def worst(self, generators: Tensor) -> Tensor:
        """Return each code's largest cosine of two points, (codes,) float64."""
        z = self._spectrum(generators, torch.float64)
        most = [self._cosines(z, *block).amax((1, 2, 3)) for block in self._blocks(z)]
        return torch.stack(most).amax(0)

    def _blocks(self, z: Tensor) -> list[tuple[int, int]]:
        codes, m = z.shape[:2]
        most = BLOCK if self.device.type == "cpu" else GPU_BLOCK
        rows = max(1, most // (codes * m * self.order))
        return [(begin, min(begin + rows, m)) for begin in range(0, m, rows)]

    def _spectrum(self, generators: Tensor, dtype: torch.dtype) -> Tensor:
        """Return (codes, m, frequencies, most), complex unless the order is at most 2."""
        parts = generators.to(dtype).reshape(*generators.shape[:-1], *self.shape)
        return parts[..., 0] if self.order <= 2 else torch.view_as_complex(parts)

    def _cosines(self, z: Tensor, begin: int, end: int) -> Tensor:
        """Return cosines (codes, rows, m − begin, p) of some generators with later ones' images.

        A generator's cosine with itself is −∞.
        """
        left = z[:, begin:end] * self.weights.to(z.real.dtype)[:, None]
        products = _products(left, z[:, begin:])
        cosines = self._to_time(products)
        own = torch.arange(end - begin, dtype=torch.int64, device=self.device)
        cosines[:, own, own, 0] = -math.inf
        return cosines

    def _to_time(self, spectrum: Tensor) -> Tensor:
        """Return Σ_k w_k·Re(spectrum_k·e^{2πika/p}) for a = 0 to p − 1; w_k is 2 inside, else 1."""
        if self.order <= SHORT:
            return _parts(spectrum) @ self._tables(spectrum.real.dtype)[0]
        if len(self.used) < self.order // 2 + 1:
            whole = spectrum.new_zeros((*spectrum.shape[:-1], self.order // 2 + 1))
            whole[..., self.used] = spectrum
            spectrum = whole
        return torch.fft.irfft(spectrum, n=self.order, norm="forward")

    def _to_frequency(self, values: Tensor) -> Tensor:
        """Return Σ_a values_a·e^{−2πika/p} for the frequencies in use."""
        if self.order <= SHORT:
            parts = values @ self._tables(values.dtype)[1]
            if self.order <= 2:
                return parts
            return torch.view_as_complex(parts.unflatten(-1, (len(self.used), 2)))
        spectrum = torch.fft.rfft(values)
        return spectrum if len(self.used) == spectrum.shape[-1] else spectrum[..., self.used]

    def _tables(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the matrices of a short transform: (parts of all frequencies, p), and back."""
        if dtype not in self.tables:
            angles = self._angles().mT  # (frequencies, p)
            parts = [angles.cos()] if self.order <= 2 else [angles.cos(), -angles.sin()]
            table = torch.stack(parts, 1).flatten(0, 1)
            counted = (1 / self.weights).repeat_interleave(len(parts))[:, None]
            self.tables[dtype] = (counted * table).to(dtype), table.mT.to(dtype)
        return self.tables[dtype]

    def _angles(self) -> Tensor:
        """Return 2πka/p, (p, frequencies), exact also for large k·a."""
        a = torch.arange(self.order, dtype=torch.int64, device=self.device)
        return (a[:, None] * self.used % self.order).double() * (2 * math.pi / self.order)


def _parts(spectrum: Tensor) -> Tensor:
    """Return real and imaginary parts side by side in the last dimension."""
    if not spectrum.is_complex():
        return spectrum
    return torch.view_as_real(spectrum.resolve_conj()).flatten(-2)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Return Σ_n left[r, k, n]·conj(right[s, k, n]) of each code: (codes, r, s, k)."""
    if left.shape[-1] <= NARROW:
        pairs = zip(left.unbind(-1), right.conj().unbind(-1), strict=True)
        return _sum(x[:, :, None] * y[:, None] for x, y in pairs)
    x, y = (_parts(each.permute(0, 2, 1, 3)) for each in (left, right))
    if not left.is_complex():
        return (x @ y.mT).permute(0, 2, 3, 1)
    # Real products: complex ones of small matrices are slow.
    turned = torch.stack([-y[..., 1::2], y[..., ::2]], -1).flatten(-2)
    both = x @ torch.cat([y, turned], -2).mT
    parts = both.unflatten(-1, (2, right.shape[1])).permute(0, 2, 4, 1, 3).contiguous()
    return torch.view_as_complex(parts)


def _applied(spectrum: Tensor, z: Tensor) -> Tensor:
    """Return Σ_s spectrum[r, s, k]·z[s, k, n] of each code: (codes, r, k, n)."""
    if z.shape[-1] <= NARROW:
        each = [(spectrum * part[:, None]).sum(2) for part in z.unbind(-1)]
        return torch.stack(each, -1)
    if not z.is_complex():
        return (spectrum.permute(0, 3, 1, 2) @ z.permute(0, 2, 1, 3)).permute(0, 2, 1, 3)
    y = torch.view_as_real(z.permute(0, 2, 1, 3))  # (codes, k, s, n, 2)
    turned = torch.stack([-y[..., 1], y[..., 0]], -1)
    right = torch.stack([y, turned], 3).flatten(2, 3).flatten(-2)
    left = torch.view_as_real(spectrum.resolve_conj()).permute(0, 3, 1, 2, 4).flatten(-2)
    parts = (left @ right).unflatten(-1, (z.shape[-1], 2)).permute(0, 2, 1, 3, 4)
    return torch.view_as_complex(parts.contiguous())


def _sum(terms: Iterable[Tensor]) -> Tensor:
    first, *others = terms
    for other in others:
        first += other
    return first
