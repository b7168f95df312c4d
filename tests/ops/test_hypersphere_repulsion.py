"""Every implementation of hypersphere repulsion against its definition in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import synface_kernels as sk
from synface_kernels import _load
from synface_kernels.ops.hypersphere_repulsion.energies import R_MIN, NeighborEnergy
from synface_kernels.testing import assert_as_exact_as_torch, peak_bytes
from tests.helpers import codes
from tests.helpers.cpu import cpu
from tests.helpers.forked import numbers_of

ISAS = _load.cpu_isas()
EPS = torch.finfo(torch.float32).eps
PAIR = [
    sk.LogSumExp(),
    sk.LogSumExp(t=500.0),
    sk.Gaussian(),
    sk.Riesz(),
    sk.Riesz(s=4.5),
    sk.Log(),
    sk.Hinge(0.1),
    sk.Hinge(-0.2, power=1),
]
NEIGHBOR = [sk.MaxCosine(), sk.MaxCosine(topk=3), sk.ClosestPair(), sk.KoLeo()]
# Points, gallery, dimension: one block of 128, several blocks, and an odd and an even number of
# blocks with one thread and with two.
SHAPES = [(5, 4, 2), (7, 130, 3), (65, 33, 16), (130, 64, 129), (700, 257, 33), (560, 530, 8)]


def as_written(energy, cosine: Tensor) -> Tensor:
    """Compute the mean energy as its paper writes it, from the cosines of all pairs (P,)."""
    distance = (2 - 2 * cosine).sqrt()
    if isinstance(energy, sk.LogSumExp):
        return ((energy.t * cosine).logsumexp(0) - math.log(len(cosine))) / energy.t
    if isinstance(energy, sk.Gaussian):
        return (-energy.t * distance**2).exp().mean().log()
    if isinstance(energy, sk.Riesz):
        return (distance**-energy.s).mean()
    if isinstance(energy, sk.Log):
        return -distance.log().mean()
    return (cosine - energy.threshold).clamp_min(0).pow(energy.power).mean() / energy.power


def points(n: int, m: int | None, d: int, dtype: torch.dtype, seed: int = 0):
    """Return x and y in float64, exact in dtype."""
    g = torch.Generator().manual_seed(seed + n + 31 * d)
    x = torch.randn(n, d, generator=g).to(dtype).double()
    return x, None if m is None else torch.randn(m, d, generator=g).to(dtype).double()


def run(x, y, energy, dtype, impl, **options) -> tuple[Tensor, ...]:
    """Return the energy and its gradients by x and, if there is one, y."""
    inputs = [v.to(dtype, copy=True).requires_grad_() for v in (x, y) if v is not None]
    loss = sk.hypersphere_repulsion(*inputs, energy=energy, impl=impl, **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), inputs)


def sharpness(energy) -> float:
    """Bound the relative change of a slope ∂E/∂c per change of its cosine c."""
    if isinstance(energy, (sk.Riesz, sk.Log)):
        return (getattr(energy, "s", 0) + 2) * 8  # (s + 2)/r² where r² is still 2 − 2c
    return 2 * getattr(energy, "t", 0)


def slopes(x, y, energy) -> tuple[float, ...]:
    """Return the sizes of the sums: Σ |∂E/∂c_ij| over all pairs, and the greatest row's of x and y.

    A row's sum is divided by its norm (of which the part along the point is taken out).
    """
    cosine = F.normalize(x) @ F.normalize(x if y is None else y).T
    cosine.requires_grad_()
    pairs = cosine.flatten()
    if y is None:
        i, j = torch.triu_indices(len(x), len(x), 1)
        pairs = cosine[i, j]
    (slope,) = torch.autograd.grad(as_written(energy, pairs), cosine)
    if y is None:
        slope = slope + slope.T
        size = slope.abs()
        return size.sum().item() / 2, (size.sum(1) / x.norm(dim=1)).max().item()
    size = slope.abs()
    return size.sum().item(), *(
        (size.sum(1 - k) / v.norm(dim=1)).max().item() for k, v in ((0, x), (1, y))
    )


def assert_matches_float64(x, y, energy, dtype, isas=ISAS[-1:]):
    exact = run(x, y, energy, torch.float64, "reference")
    plain = run(x, y, energy, dtype, "reference")
    if isinstance(energy, NeighborEnergy):
        sizes = [1, *(1 / v.norm(dim=1).min().item() for v in (x, y) if v is not None)]
    else:  # the cosines are off by a few ε
        total, *rows = slopes(x, y, energy)
        sizes = [1 + total, *((1 + sharpness(energy)) * size for size in rows)]
    names = ("loss", "grad_x", "grad_y")[: len(exact)]
    for isa in isas:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("SYNFACE_CPU_ISA", isa)
            actual = run(x, y, energy, dtype, "cpu")
        for name, a, e, p, size in zip(names, actual, exact, plain, sizes, strict=True):
            what = f"{name} of {energy}, {isa}"
            assert_as_exact_as_torch(a, e, p, atol=4 * EPS * size, name=what)


# ---- the definition ------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("energy", PAIR, ids=str)
@pytest.mark.parametrize("gallery", [False, True])
def test_pair_energies_as_their_papers_write_them(energy, gallery, impl):
    x, y = points(40, 9 if gallery else None, 6, torch.float64)
    cosine = F.normalize(x) @ F.normalize(x if y is None else y).T
    pairs = cosine.flatten() if gallery else cosine[tuple(torch.triu_indices(40, 40, 1))]
    expected = as_written(energy, pairs)
    actual = sk.hypersphere_repulsion(x, y, energy=energy, impl=impl)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
    count = len(pairs)
    total = sk.hypersphere_repulsion(x, y, energy=energy, reduction="sum", impl=impl)
    if isinstance(energy, (sk.LogSumExp, sk.Gaussian)):
        extra = math.log(count) / (energy.t if isinstance(energy, sk.LogSumExp) else 1)
        torch.testing.assert_close(total, expected + extra)
    else:
        torch.testing.assert_close(total, expected * count)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("gallery", [False, True])
def test_neighbor_energies_as_their_papers_write_them(gallery, impl):
    x, y = points(40, 9 if gallery else None, 6, torch.float64)
    cosine = F.normalize(x) @ F.normalize(x if y is None else y).T
    if not gallery:
        cosine.fill_diagonal_(-2)
    top = cosine.topk(3, dim=1).values

    def energy(kind, **options):
        return sk.hypersphere_repulsion(x, y, energy=kind, impl=impl, **options)

    torch.testing.assert_close(energy(sk.MaxCosine()), top[:, 0].mean())
    torch.testing.assert_close(energy(sk.MaxCosine(3), reduction="none"), top.mean(1))
    torch.testing.assert_close(energy(sk.MaxCosine(3), reduction="sum"), top.mean(1).sum())
    torch.testing.assert_close(energy(sk.ClosestPair()), cosine.max())
    koleo = -(2 - 2 * top[:, 0]).sqrt().log()
    torch.testing.assert_close(energy(sk.KoLeo()), koleo.mean())
    torch.testing.assert_close(energy(sk.KoLeo(), reduction="none"), koleo)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("energy", PAIR + NEIGHBOR, ids=str)
def test_gradcheck(energy, impl):
    if energy == sk.LogSumExp(t=500.0):
        energy = sk.LogSumExp(t=50.0)  # central differences need a smooth function
    x, y = (v.requires_grad_() for v in points(9, 5, 4, torch.float64, seed=3))

    def f(*inputs):
        return sk.hypersphere_repulsion(*inputs, energy=energy, impl=impl)

    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradcheck(f, (x, y))


# ---- the CPU kernel ------------------------------------------------------------------------------


@pytest.mark.parametrize("gallery", [False, True])
@pytest.mark.parametrize("energy", PAIR + NEIGHBOR, ids=str)
def test_float32_matches_float64(energy, gallery):
    for n, m, d in SHAPES:
        x, y = points(n, m if gallery else None, d, torch.float32)
        assert_matches_float64(x, y, energy, torch.float32, ISAS)


@pytest.mark.parametrize("gallery", [False, True])
@pytest.mark.parametrize("energy", PAIR + NEIGHBOR, ids=str)
def test_float64_matches_the_reference(energy, gallery, monkeypatch):
    for n, m, d in SHAPES:
        x, y = points(n, m if gallery else None, d, torch.float64)
        exact = run(x, y, energy, torch.float64, "reference")
        for isa in ISAS:
            monkeypatch.setenv("SYNFACE_CPU_ISA", isa)
            assert _load.cpu_isa() == isa
            for a, e in zip(run(x, y, energy, torch.float64, "cpu"), exact, strict=True):
                atol = 1e-11 * max(1, e.abs().max().item())
                torch.testing.assert_close(a, e, rtol=1e-9, atol=atol)


@pytest.mark.parametrize("energy", [sk.LogSumExp(), sk.Riesz(), sk.KoLeo()], ids=str)
@pytest.mark.slow
def test_blocks_of_full_size(energy):
    x, y = points(2500, 600, 5, torch.float32)
    with cpu(threads=1):  # blocks of 500: for more threads there are more of them
        assert_matches_float64(x, None, energy, torch.float32)
        assert_matches_float64(y, x, energy, torch.float32)


@pytest.mark.parametrize("gallery", [False, True])
@pytest.mark.parametrize("energy", PAIR + NEIGHBOR, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_points(dtype, energy, gallery):
    for n, m, d in ((9, 5, 3), (300, 140, 65)):
        assert_matches_float64(*points(n, m if gallery else None, d, dtype), energy, dtype)


@given(
    n=st.integers(4, 300),
    m=st.none() | st.integers(3, 300),
    d=st.integers(2, 70),
    energy=st.sampled_from(PAIR + NEIGHBOR),
    seed=st.integers(0, 1000),
)
def test_any_shape(n, m, d, energy, seed):
    assert_matches_float64(*points(n, m, d, torch.float32, seed), energy, torch.float32)


def test_dtypes_strides_and_which_gradients():
    x, y = points(40, 20, 6, torch.bfloat16)
    exact = sk.hypersphere_repulsion(x, y, impl="reference")
    x16, y32 = x.bfloat16().requires_grad_(), y.float()
    wide = torch.zeros(20, 14)
    wide[:, 1:13:2] = y32
    loss = sk.hypersphere_repulsion(x16, wide[:, 1:13:2])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact.double(), rtol=1e-6, atol=0)
    loss.backward()
    assert x16.grad is not None
    assert x16.grad.dtype == torch.bfloat16
    y32.requires_grad_()
    for energy in (sk.Log(), sk.MaxCosine()):
        sk.hypersphere_repulsion(x16.detach(), y32, energy=energy).backward()
    assert y32.grad is not None
    assert y32.grad.abs().sum() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sk.hypersphere_repulsion(x16.detach(), y32.detach()), loss.detach())


@pytest.mark.parametrize("energy", PAIR + NEIGHBOR, ids=str)
def test_upstream_gradient_and_retained_graph(energy):
    x, _ = points(30, None, 5, torch.float32)
    x = x.float().requires_grad_()
    loss = sk.hypersphere_repulsion(x, energy=energy)
    (once,) = torch.autograd.grad(loss, x, retain_graph=True)
    (scaled,) = torch.autograd.grad(-3 * loss, x)
    torch.testing.assert_close(scaled, -3 * once, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("energy", PAIR + NEIGHBOR, ids=str)
@pytest.mark.parametrize("gallery", [False, True])
def test_two_runs_agree_bitwise(energy, gallery):
    x, y = points(1500, 900 if gallery else None, 64, torch.float32)
    first = run(x, y, energy, torch.float32, "cpu")
    for _ in range(3):
        for a, b in zip(run(x, y, energy, torch.float32, "cpu"), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("energy", [sk.LogSumExp(), sk.Log(), sk.MaxCosine()], ids=str)
def test_any_number_of_threads(energy):
    x, y = points(900, 700, 16, torch.float32)
    for threads in (1, 3, 8):
        with cpu(threads=threads):
            assert_matches_float64(x, None, energy, torch.float32)
            assert_matches_float64(x, y, energy, torch.float32)


@pytest.mark.parametrize("energy", PAIR + NEIGHBOR, ids=str)
def test_compile_fullgraph(energy):
    torch.compiler.reset()  # avoids the limit of recompilations
    x, y = (v.float().requires_grad_() for v in points(20, 8, 6, torch.float32))

    def f(x, y):
        own = sk.hypersphere_repulsion(x, energy=energy, impl="cpu")
        return own + sk.hypersphere_repulsion(x, y, energy=energy, impl="cpu")

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), f(x, y))
    for a, b in zip(
        torch.autograd.grad(compiled(x, y), (x, y)), torch.autograd.grad(f(x, y), (x, y)),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("energy", PAIR + NEIGHBOR, ids=str)
@pytest.mark.parametrize("gallery", [False, True])
def test_the_definition_is_compiled_with_and_without_a_gradient(energy, gallery):
    torch.compiler.reset()
    x, y = (v.float() for v in points(20, 8, 6, torch.float32))
    x[3] = x[2]  # the pair that needs a direction
    compiled = torch.compile(sk.hypersphere_repulsion, fullgraph=True, backend="aot_eager")
    options = {"energy": energy, "impl": "reference"}
    for needs_grad in (False, True):
        one, two = (x.clone().requires_grad_(needs_grad) for _ in range(2))
        others = y if gallery else None
        actual = compiled(one, others, **options)
        expected = sk.hypersphere_repulsion(two, others, **options)
        torch.testing.assert_close(actual, expected)
        if needs_grad:
            grads = (torch.autograd.grad(v, p)[0] for v, p in ((actual, one), (expected, two)))
            torch.testing.assert_close(*grads)


@pytest.mark.parametrize("energy", PAIR + NEIGHBOR, ids=str)
@pytest.mark.parametrize("gallery", [False, True])
def test_tensors_without_values(energy, gallery):
    x = torch.empty(5, 4, device="meta", requires_grad=True)
    y = torch.empty(3, 4, device="meta") if gallery else None
    value = sk.hypersphere_repulsion(x, y, energy=energy)
    assert (value.shape, value.device.type) == ((), "meta")
    value.backward()
    assert x.grad.shape == x.shape


def test_compile_with_inductor():
    x = points(20, None, 6, torch.float32)[0].float().requires_grad_()

    def f(x):
        cosine, index = sk.nearest_neighbors(x, k=2)
        return sk.hypersphere_repulsion(x) + cosine.sum() + (index >= 0).sum()

    torch.testing.assert_close(torch.compile(f, fullgraph=True)(x), f(x))


def test_no_second_derivative():
    x = torch.randn(5, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(
        sk.hypersphere_repulsion(x, energy=sk.MaxCosine()), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def print_peak(n: int, d: int, energy: Any, dtype: torch.dtype) -> None:
    """Print the peak of a forward and a backward pass in bytes."""
    x = torch.randn(n, d).to(dtype).requires_grad_()
    sk.hypersphere_repulsion(x[:300].detach().requires_grad_()).backward()
    print(peak_bytes(lambda: sk.hypersphere_repulsion(x, energy=energy).backward()))


@pytest.mark.parametrize("energy", [sk.MaxCosine(2), sk.LogSumExp()], ids=str)
@pytest.mark.slow
def test_memory(energy, tmp_path):
    """N×N would be 1.6 GB."""
    neighbors = 20_000 * (10 * 12 + 3 * 16)  # candidates for k = 2, and the results
    (peak,) = numbers_of(tmp_path / "shown", print_peak, 20_000, 16, energy, torch.float32)
    assert peak <= (64 << 20) + 2 * 20_000 * 16 * 4 + neighbors


@pytest.mark.parametrize(
    ("energy", "gradients"), [(sk.MaxCosine(), 1), (sk.LogSumExp(), 2)], ids=str
)
@pytest.mark.slow
def test_memory_of_gradients(energy, gradients, tmp_path):
    """Energies of all pairs hold two: the saved one, and the one that backward returns."""
    n, d = 2000, 10_000  # a gradient too many is more than 64 MiB
    (peak,) = numbers_of(tmp_path / "shown", print_peak, n, d, energy, torch.float32)
    assert peak <= (64 << 20) + gradients * n * d * 4


# ---- sharp exponentials, and points that (nearly) coincide ---------------------------------------


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("t", [1.0, 1000.0, 1e5])
def test_exponentials_neither_vanish_nor_overflow(t, impl):
    for cosine, x in (
        (-1.0, torch.tensor([[1.0, 0.0], [-2.0, 0.0]])),
        (0.0, torch.eye(300)),
        (0.3, torch.tensor([[1.0, 0.0], [0.3, math.sqrt(1 - 0.09)]])),
    ):
        x = x.clone().requires_grad_()
        loss = sk.hypersphere_repulsion(x, energy=sk.LogSumExp(t), impl=impl)
        assert loss.item() == pytest.approx(cosine, abs=2e-7)
        loss.backward()
        assert x.grad.isfinite().all()
        assert (x.grad.norm() > 0.1) == (abs(cosine) == 0.3)


def test_the_maximum_may_grow_late():
    """The closest pair is in the last blocks, so earlier sums and gradients are scaled down."""
    x, _ = points(1100, None, 24, torch.float32)
    x[-1] = x[-2] + 0.2 * torch.randn(24, generator=torch.Generator().manual_seed(0)).double()
    x = x.float().double()
    for energy in (sk.LogSumExp(300.0), sk.LogSumExp(3000.0)):
        assert_matches_float64(x, None, energy, torch.float32)
        assert_matches_float64(x[:550], x[550:], energy, torch.float32)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("energy", PAIR + NEIGHBOR, ids=str)
@pytest.mark.parametrize("gallery", [False, True])
def test_identical_points_repel_each_other(energy, gallery, impl):
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    x[4] = 2 * x[1]  # the same point
    x, y = (x[:4].double(), x[3:].double()) if gallery else (x.double(), None)
    loss, *grads = run(x, y, energy, torch.float32, impl)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in grads)
    a, b = (grads[0][1], grads[1][1]) if gallery else (grads[0][1], grads[0][4])
    a, b = a.double(), b.double()  # squares of Riesz gradients leave float32
    assert a.norm() > 0
    assert b.norm() > 0
    # A step against the gradients separates them, whatever the energy's unit.
    step = 0.1 * x[1].norm() / a.norm()
    other = y[1] if gallery else x[4]
    cosine = F.cosine_similarity(x[1] - step * a, other - step * b, dim=0)
    assert cosine < 0.9999


@pytest.mark.parametrize("energy", PAIR + NEIGHBOR, ids=str)
@pytest.mark.parametrize("gallery", [False, True])
def test_identical_points_match_the_reference(energy, gallery):
    """Identical points on all axes, in both orders, more than two of them, and on an axis."""
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[20:40] = x[:20]
    x[40:45] = 4 * x[:5]
    x[45:55] = torch.eye(5, dtype=torch.float64).repeat(2, 1)
    y = x[10:50].clone() if gallery else None
    for a, e in zip(
        run(x, y, energy, torch.float64, "cpu"),
        run(x, y, energy, torch.float64, "reference"),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-9 * e.abs().max().item())


@pytest.mark.parametrize("s", [0.5, 2.0, 4.0, 16.0])
def test_riesz_of_identical_points_stays_in_float32(s):
    x = torch.ones(40, 7, requires_grad=True)
    for energy in (sk.Riesz(s), sk.Log(), sk.KoLeo()):
        x.grad = None
        loss = sk.hypersphere_repulsion(x, energy=energy, reduction="sum")
        loss.backward()
        assert loss.isfinite()
        assert x.grad.isfinite().all()
    assert sk.Riesz(s).r_min >= R_MIN


@pytest.mark.parametrize("energy", [sk.Riesz(), sk.Riesz(3.0), sk.Log(), sk.KoLeo()], ids=str)
@pytest.mark.parametrize("distance", [0.3, 1e-2, 1e-4, 3e-6])
def test_near_duplicates_lose_no_digits(energy, distance):
    """2 − 2c in float32 would be off by 1e-7, more than all of r² here."""
    x, _ = points(4, None, 64, torch.float32)
    x = torch.cat([F.normalize(x), F.normalize(x)])
    x[4:] += distance * torch.randn(4, 64, generator=torch.Generator().manual_seed(2)) / 8
    x = x.float().double()
    exact = run(x, None, energy, torch.float64, "reference")
    for a, e in zip(run(x, None, energy, torch.float32, "cpu"), exact, strict=True):
        error = (a - e).norm() / e.norm()
        assert error < 2e-6, error


# ---- nearest neighbors --------------------------------------------------------------------------


def expected_neighbors(x, y, k, dtype):
    """Rank by cosines in double, rounded to dtype; the lowest index first among equals."""
    cosine = (F.normalize(x.double()) @ F.normalize((x if y is None else y).double()).T).to(dtype)
    if y is None:
        cosine.fill_diagonal_(-2)
    found = cosine.sort(dim=1, descending=True, stable=True)
    return found.values[:, :k], found.indices[:, :k]


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gallery", [False, True])
@pytest.mark.parametrize("isa", ISAS)
def test_neighbors_are_exact(isa, gallery, dtype, monkeypatch):
    monkeypatch.setenv("SYNFACE_CPU_ISA", isa)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    for n, m, d in SHAPES:
        x, y = points(n, m if gallery else None, d, dtype)
        for k in (1, 2, 4, min(n - 1, m, 60)):
            cosine, index = sk.nearest_neighbors(
                x.to(dtype), None if y is None else y.to(dtype), k, impl="cpu"
            )
            values, expected = expected_neighbors(x, y, k, kind)
            assert cosine.dtype == kind
            torch.testing.assert_close(cosine, values, rtol=0, atol=8 * torch.finfo(kind).eps)
            assert torch.equal(index, expected)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("gallery", [False, True])
def test_ties_go_to_the_lowest_index(gallery, impl):
    """Signs in four dimensions are sixteen points, so each has hundreds of equal cosines."""
    signs = torch.randint(0, 2, (700, 4), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    x, y = signs, signs[::3].clone() if gallery else None
    for k in (1, 5, 40, 200):
        cosine, index = sk.nearest_neighbors(x, y, k, impl=impl)
        values, expected = expected_neighbors(x, y, k, torch.float32)
        assert torch.equal(cosine, values)
        assert torch.equal(index, expected)


def test_neighbors_closer_than_float32_tells_apart():
    """Cosines that differ by 1e-9 in double, many more than a row has candidates."""
    center = torch.zeros(64)
    center[0] = 1
    offsets = torch.randn(500, 64, generator=torch.Generator().manual_seed(5)) * 2e-4
    offsets[:, 0] = 0
    y = center + offsets
    x = center[None]
    cosine, index = sk.nearest_neighbors(x, y, k=20)
    values, expected = expected_neighbors(x, y, 20, torch.float32)
    assert torch.equal(cosine, values)
    assert torch.equal(index, expected)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_neighbors_are_differentiable(impl):
    x, y = (v.requires_grad_() for v in points(8, 6, 4, torch.float64))
    assert torch.autograd.gradcheck(lambda x: sk.nearest_neighbors(x, k=3, impl=impl)[0], x)
    assert torch.autograd.gradcheck(
        lambda x, y: sk.nearest_neighbors(x, y, k=3, impl=impl)[0], (x, y)
    )
    assert not sk.nearest_neighbors(x, impl=impl)[1].requires_grad


# ---- codes that are known exactly ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", codes.SMALL)
@pytest.mark.parametrize(
    "energy", [sk.Log(), sk.Riesz(1.0), sk.Riesz(6.0), sk.Gaussian(), sk.Gaussian(9.0)], ids=str
)
def test_forces_vanish_on_exact_codes(energy, name, dtype):
    """Each point's forces balance, so the gradient, which has no radial part, is zero."""
    code = codes.SMALL[name]
    x = code.points()
    _, size = slopes(x, None, energy)
    _, grad = run(x, None, energy, dtype, "cpu")
    assert grad.norm(dim=1).max() <= 8 * torch.finfo(dtype).eps * size
    # The gradient is not zero after a point is moved.
    moved = x.clone()
    moved[0] += 0.01 * torch.arange(1.0, code.dim + 1, dtype=x.dtype)
    _, grad = run(moved, None, energy, dtype, "cpu")
    assert grad.norm(dim=1).max() > 1e-4 * size


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", codes.SMALL)
def test_worst_cosines_of_exact_codes(name, dtype):
    code = codes.SMALL[name]
    x = code.points().to(dtype)
    cosine, _ = sk.nearest_neighbors(x)
    tolerance = 4 * torch.finfo(dtype).eps
    assert x.shape == (code.count, code.dim)
    assert (cosine - code.worst).abs().max() <= tolerance
    worst = sk.hypersphere_repulsion(x, energy=sk.ClosestPair())
    assert abs(worst.item() - code.worst) <= tolerance


def test_kerdock_4224_in_64():
    """Cosines ±1/8 and 0 (and −1): thousands of ties for every point."""
    x = codes.KERDOCK_64.points().float()
    assert x.shape == (4224, 64)
    cosine, index = sk.nearest_neighbors(x)
    assert (cosine - 1 / 8).abs().max() <= 1e-7
    assert torch.equal(index, (x @ x.T == 1 / 8).int().argmax(1, keepdim=True))
    for energy in (sk.Log(), sk.Riesz(), sk.Gaussian()):
        _, grad = run(x, None, energy, torch.float32, "cpu")
        assert grad.norm(dim=1).max() <= 8 * EPS * 4 / 4224  # slopes of order 1, by the mean


def test_explain():
    assert sk.explain(sk.hypersphere_repulsion).impl == "cpu"
    with pytest.raises(RuntimeError, match="triton"):
        sk.hypersphere_repulsion(torch.eye(4), impl="triton")
