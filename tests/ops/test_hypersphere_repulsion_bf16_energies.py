"""Energies of bfloat16 points by bfloat16 GEMMs, and of float32 points by bf16 splits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import synface_kernels as sk
from synface_kernels import _load
from tests.helpers.cpu import cpu
from tests.helpers.forked import numbers_of
from tests.ops.test_hypersphere_repulsion import (
    EPS,
    PAIR,
    as_written,
    points,
    print_peak,
    run,
    sharpness,
)

ISAS = _load.cpu_isas()
BF16 = [isa for isa in ISAS if isa.endswith("bf16")]
pytestmark = pytest.mark.skipif(not BF16, reason="this processor has no bfloat16 instructions")
each_isa = pytest.mark.parametrize("isa", BF16)
each_energy = pytest.mark.parametrize("energy", PAIR, ids=str)
# Points, gallery, dimension: few pairs (which are multiplied in float32), one block and several,
# odd numbers of all, and dimensions that the kernel splits into slices.
SHAPES = [
    (2, None, 1), (2, None, 5), (9, 5, 3), (130, None, 1), (129, None, 2), (131, 127, 3),
    (257, 300, 33), (600, None, 65), (129, None, 1537), (1, 16_500, 3),
]  # fmt: skip
ROUNDING = 2.0**-8  # relative error of a number rounded to bfloat16
SPLIT = 3 * 2.0**-18  # of a product of two bf16 splits
CLOSE = 15 / 16  # pairs from this cosine on are computed in double


def row_sums(x: Tensor, y: Tensor | None, energy) -> list[Tensor]:
    """Return Σ_j |∂E/∂c_ij| of each point, (N,) and (M,), over the pairs that are not close."""
    cosine = (F.normalize(x) @ F.normalize(x if y is None else y).T).requires_grad_()
    pairs = torch.ones_like(cosine, dtype=torch.bool)
    pairs = pairs.triu(1) if y is None else pairs
    of_pairs = cosine[pairs].clamp_max(1 - 1e-9)  # identical points have no slope
    (slope,) = torch.autograd.grad(as_written(energy, of_pairs), cosine)
    size = torch.where(pairs & (cosine < CLOSE), slope.abs(), 0)
    return [(size + size.T).sum(1)] if y is None else [size.sum(1), size.sum(0)]


class Errors(NamedTuple):
    """Errors that rounding explains: absolute of a cosine, relative of a weight and a result."""

    cosine: float
    weight: float
    stored: float


def assert_matches(x, y, energy, dtype, errors: Errors) -> list[float]:
    """Check points in `dtype`, given in float64, row by row; return the gradients' relative errors.

    Gradients are compared by unit vectors, that is times the points' norms: with float64, and
    beyond what rounding explains to within the worst row's error of the float32 kernel.
    """
    exact = run(x, y, energy, torch.float64, "reference")
    with at_precision("highest"):
        plain = run_on("avx512", x, y, energy, torch.float32)
    sizes = row_sums(x, y, energy)
    weight = errors.weight + sharpness(energy) * errors.cosine
    absolute = 2 / len(x) * errors.cosine if isinstance(energy, sk.Hinge) else 0.0
    relative = []
    for isa in BF16:
        found = run_on(isa, x, y, energy, dtype)
        off, own = ((v[0] - exact[0]).abs() for v in (found, plain))
        assert off <= 4 * own + 64 * EPS * (1 + exact[0].abs()) + errors.cosine * sizes[0].sum()
        for v, a, e, p, size in zip((x, y), found[1:], exact[1:], plain[1:], sizes, strict=False):
            norms = v.norm(dim=1, keepdim=True)
            assert a.isfinite().all()
            tiny = torch.finfo(dtype).smallest_normal * norms.squeeze(1)
            a, e, p = (grad.double() * norms for grad in (a, e, p))
            bound = weight * size + errors.stored * e.norm(dim=1) + tiny + absolute
            bound += 4 * (p - e).norm(dim=1).max() + 16 * EPS * size.max()
            row_off = (a - e).norm(dim=1)
            assert (row_off <= bound).all(), (isa, (row_off / bound).max())
            relative.append(((a - e).norm() / e.norm()).item())
    return relative


def run_on(isa, x, y, energy, dtype) -> tuple[Tensor, ...]:
    with cpu(isa):
        return run(x, y, energy, dtype, "cpu")


@contextmanager
def at_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def assert_bf16_matches(x, y, energy) -> list[float]:
    errors = Errors(cosine=0, weight=ROUNDING, stored=ROUNDING)
    return assert_matches(x, y, energy, torch.bfloat16, errors)


def assert_split_matches(x, y, energy) -> None:
    errors = Errors(cosine=SPLIT, weight=SPLIT, stored=4 * EPS)
    with at_precision("high"):
        assert_matches(x, y, energy, torch.float32, errors)


# ---- bfloat16 points -----------------------------------------------------------------------------


@each_energy
def test_matches_float64(energy):
    for n, m, d in SHAPES:
        errors = assert_bf16_matches(*points(n, m, d, torch.bfloat16), energy)
        if d > 3:  # in fewer dimensions the weights cancel
            assert max(errors) <= ROUNDING  # measured: 2.5e-3, of which 1.7e-3 by storing


@given(
    n=st.integers(1, 400),
    m=st.none() | st.integers(1, 400),
    d=st.integers(1, 90),
    energy=st.sampled_from(PAIR),
    seed=st.integers(0, 1000),
)
def test_any_shape(n, m, d, energy, seed):
    x, y = points(n + (m is None), m, d, torch.bfloat16, seed)
    assert_bf16_matches(x, y, energy)


@pytest.mark.parametrize("energy", [sk.LogSumExp(), sk.Log()], ids=str)
def test_any_number_of_threads(energy):
    x, y = points(900, 700, 33, torch.bfloat16)
    for threads in (1, 3, 8):
        with cpu(threads=threads):
            assert_bf16_matches(x, None, energy)
            assert_bf16_matches(x, y, energy)


@each_energy
@pytest.mark.parametrize("gallery", [False, True])
def test_close_and_identical_points(gallery, energy):
    x, y = points(200, 150 if gallery else None, 24, torch.bfloat16)
    x[100:140] = x[60:100]
    x[140:160] = 4 * x[:20]
    x[160:190] = (x[:30] + 0.02 * x[30:60]).bfloat16().double()
    if y is not None:
        y[:50], y[50:70] = x[:50], 0.5 * x[150:170]
    assert_bf16_matches(x, y, energy)


def test_the_maximum_may_grow_late():
    """The closest pair is in the last blocks, so earlier sums and gradients are scaled down."""
    x, _ = points(1100, None, 24, torch.bfloat16)
    x[-1] = x[-2] + 0.2 * torch.randn(24, generator=torch.Generator().manual_seed(0)).double()
    x = x.bfloat16().double()
    for energy in (sk.LogSumExp(300.0), sk.LogSumExp(3000.0)):
        assert_bf16_matches(x, None, energy)
        assert_bf16_matches(x[:550], x[550:], energy)


def scaled(rows: Tensor, seed: int, least: int, most: int) -> tuple[Tensor, Tensor]:
    """Return rows times powers of two with exponents in [least, most], and the powers (N, 1)."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(least, most + 1, (len(rows), 1), generator=generator)
    powers = torch.ldexp(torch.ones_like(rows[:, :1]), exponents)
    return rows * powers, powers


@each_isa
@each_energy
@pytest.mark.parametrize("gallery", [False, True])
def test_rows_of_very_different_norms(gallery, energy, isa):
    """Norms from 1e-11 to 1e30: the gradients' bits are those of rows of one length."""
    x, y = points(140, 131 if gallery else None, 19, torch.bfloat16)
    long, powers = scaled(x, 1, -37, 95)
    other, other_powers = (None, None) if y is None else scaled(y, 2, -37, 95)
    assert_bf16_matches(long, other, energy)
    found = run_on(isa, long, other, energy, torch.bfloat16)
    even = run_on(isa, x / 2**20, None if y is None else y / 2**20, energy, torch.bfloat16)
    assert torch.equal(found[0], even[0])
    all_powers = [powers] if other_powers is None else [powers, other_powers]
    for a, b, power in zip(found[1:], even[1:], all_powers, strict=True):
        # Others are rounded again when they are stored.
        normal = (torch.minimum(a.abs(), b.abs()) > 2.0**-118).all(1)
        assert normal.any()
        assert torch.equal((a.double() * power)[normal], (b.double() / 2**20)[normal])


def test_norms_up_to_which_points_are_multiplied_as_they_came():
    x, _ = points(150, None, 16, torch.bfloat16)
    x[:50] = F.normalize(x[:50]).bfloat16().double()
    for factor in (2.0**-8, 2.0**-7, 1.0, 2.0**7, 2.0**8):
        rows = x.clone()
        rows[::3] *= factor
        for energy in (sk.LogSumExp(1000.0), sk.Riesz(16.0)):
            assert_bf16_matches(rows, None, energy)


@each_isa
def test_rows_need_not_be_contiguous(isa):
    x, _ = points(200, None, 33, torch.bfloat16)
    wide = torch.full((200, 50), math.nan, dtype=torch.bfloat16)
    wide[:, 3:36] = x.bfloat16()
    with cpu(isa):
        for rows in (wide[:, 3:36], x.bfloat16().T.contiguous().T):
            rows = rows.detach().requires_grad_()
            loss = sk.hypersphere_repulsion(rows)
            found = loss.detach(), *torch.autograd.grad(loss, rows)
            expected = run(x, None, sk.LogSumExp(), torch.bfloat16, "cpu")
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a, b)


def bits(x, y, energy, dtypes, isa) -> list[Tensor]:
    leaves = [v.to(d).requires_grad_() for v, d in zip((x, y), dtypes, strict=True)]
    with cpu(isa):
        loss = sk.hypersphere_repulsion(*leaves, energy=energy, impl="cpu")
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@each_isa
@each_energy
def test_which_dtypes_are_multiplied_in_bfloat16(energy, isa):
    """Both matrices must be bfloat16 under "highest"; other dtypes keep the bits of avx512."""
    x, y = points(150, 140, 33, torch.bfloat16)
    f16, f32, b16 = torch.float16, torch.float32, torch.bfloat16
    for dtypes in ((f32, f32), (f16, f16), (b16, f32), (f32, b16), (b16, f16), (b16, b16)):
        expected = bits(x, y, energy, dtypes, "avx512")
        found = bits(x, y, energy, dtypes, isa)
        same = [torch.equal(a, b) for a, b in zip(found, expected, strict=True)]
        assert all(same[1:]) == (dtypes != (b16, b16))
        assert all(same) or dtypes == (b16, b16)
    f64 = torch.float64, torch.float64
    assert torch.equal(bits(x, y, energy, f64, isa)[1], bits(x, y, energy, f64, "avx512")[1])


@each_isa
@each_energy
@pytest.mark.parametrize("gallery", [False, True])
def test_two_runs_agree_bitwise(gallery, energy, isa):
    x, y = points(1500, 900 if gallery else None, 64, torch.bfloat16)
    for threads in (1, 2, 3):
        with cpu(isa, threads):
            first = run(x, y, energy, torch.bfloat16, "cpu")
            for a, b in zip(run(x, y, energy, torch.bfloat16, "cpu"), first, strict=True):
                assert torch.equal(a, b)


@each_isa
def test_each_gradient_alone_has_the_same_bits(isa):
    x, y = (v.bfloat16() for v in points(300, 200, 33, torch.bfloat16))
    with cpu(isa):
        both = run(x, y, sk.Log(), torch.bfloat16, "cpu")
        for k in (0, 1):
            leaves = [x.clone(), y.clone()]
            leaves[k].requires_grad_()
            loss = sk.hypersphere_repulsion(*leaves, energy=sk.Log())
            assert torch.equal(loss.detach(), both[0])
            assert torch.equal(torch.autograd.grad(loss, leaves[k])[0], both[1 + k])


@pytest.mark.slow
def test_memory(tmp_path):
    """The gradient in float32 from forward to backward, and the one that backward returns."""
    n, d = 20_000, 16
    arguments = n, d, sk.LogSumExp(), torch.bfloat16
    (peak,) = numbers_of(tmp_path / "shown", print_peak, *arguments)
    assert peak <= (64 << 20) + n * d * (4 + 4 + 2)


# ---- float32 points under torch's "high" precision -----------------------------------------------


def float32_points(n: int, m: int | None, d: int) -> tuple[Tensor, Tensor | None]:
    """Return points in float64 that are float32 and not bfloat16."""
    return points(n, m, d, torch.float32)


@each_energy
def test_high_matches_float64(energy):
    for n, m, d in SHAPES:
        assert_split_matches(*float32_points(n, m, d), energy)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("gallery", [False, True])
def test_what_is_split(gallery, isa):
    """GEMMs are split where named and allowed; otherwise results have the bits of "highest"."""
    x, y = points(200, 140 if gallery else None, 33, torch.float16)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        exact = run_on(isa, x, y, sk.LogSumExp(), dtype)
        for precision in ("high", "medium"):
            with at_precision(precision):
                found, again = (run_on(isa, x, y, sk.LogSumExp(), dtype) for _ in range(2))
            same = [torch.equal(a, b) for a, b in zip(found, exact, strict=True)]
            assert all(same[1:]) == (isa not in BF16 or dtype != torch.float32)
            assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_high_without_a_named_set():
    """Three bfloat16 GEMMs are slower than one in float32 without AMX."""
    if ISAS[-1] == "onednn_bf16":
        pytest.skip("this processor has AMX")
    x, _ = float32_points(200, None, 33)
    expected = run(x, None, sk.LogSumExp(), torch.float32, "cpu")
    with at_precision("high"):
        found = run(x, None, sk.LogSumExp(), torch.float32, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_high_of_close_points_and_of_different_norms():
    x, _ = float32_points(200, None, 24)
    x[100:140] = 3 * x[60:100]
    x[140:180] = (x[:40] + 1e-3 * x[20:60]).float().double()
    x, _ = scaled(x, 3, -37, 95)
    for energy in (sk.LogSumExp(), sk.Log(), sk.Riesz()):
        assert_split_matches(x, None, energy)


@pytest.mark.parametrize("isa", BF16[:1])
def test_a_compiled_call_follows_the_setting(isa, monkeypatch):
    monkeypatch.setenv("SYNFACE_CPU_ISA", isa)
    torch.compiler.reset()
    x = float32_points(200, None, 33)[0].float().requires_grad_()

    def gradient(f):
        return torch.autograd.grad(f(x), x)[0]

    compiled = torch.compile(sk.hypersphere_repulsion, fullgraph=True, backend="eager")
    grads = []
    for precision in ("highest", "high"):
        with at_precision(precision):
            grads.append(gradient(compiled))
            assert torch.equal(grads[-1], gradient(sk.hypersphere_repulsion))
    assert not torch.equal(*grads)
