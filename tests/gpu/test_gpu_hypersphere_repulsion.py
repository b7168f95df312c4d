"""Hypersphere repulsion on a GPU, against its definition in float64. Run by `make gpu-evidence`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import synface_kernels as sk
from synface_kernels.testing import assert_as_exact_as_torch
from tests.gpu.on_device import (
    BF16,
    DEVICE,
    EPS,
    F16,
    F32,
    F64,
    assert_no_host_sync,
    assert_same,
    compiled,
    needs_device,
    normal,
    on_another_device,
    one_process_group,
    peak_bytes,
    pick,
    replayed,
    rng,
)

pytestmark = needs_device
PAIRS = [
    sk.LogSumExp(100.0),
    sk.Gaussian(),
    sk.Riesz(),
    sk.Log(),
    sk.Hinge(0.1),
    sk.Hinge(-0.2, power=1),
]
NEIGHBORS = [sk.MaxCosine(topk=2), sk.KoLeo(), sk.ClosestPair()]
N, M, D = pick((700, 300, 129), (8, 6, 5))
each_energy = pytest.mark.parametrize("energy", PAIRS + NEIGHBORS, ids=str)
FEW = [sk.LogSumExp(100.0), sk.Log(), sk.MaxCosine(topk=2)]
each_kind = pytest.mark.parametrize("energy", FEW, ids=str)


def points(n: int, m: int | None, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return points, two of them at one position and two close together, and a gallery."""
    x = normal(n, d, seed=1, dtype=dtype)
    x[n // 2] = 2 * x[1]
    x[n - 1] = x[0] + 0.01 * x[2]
    y = None if m is None else normal(m, d, seed=2, dtype=dtype)
    if y is not None:
        y[y.shape[0] // 2] = x[3]
    return x, y


def run(
    x: Tensor, y: Tensor | None, energy: Any, impl: str, dtype: torch.dtype | None = None, **options
) -> list[Tensor]:
    """Return the energy and its gradients, in a dtype or the points' own."""
    leaves = [v.to(dtype, copy=True).requires_grad_() for v in (x, y) if v is not None]
    loss = sk.hypersphere_repulsion(*leaves, energy=energy, impl=impl, **options)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


def check(x: Tensor, y: Tensor | None, energy: Any) -> None:
    """Check against float64: as exact as float32; factors of 16-bit GEMMs are rounded once."""
    exact = run(x, y, energy, "reference", F64)
    plain = run(x, y, energy, "reference")
    # In units of the greatest element, as the pair that coincides outweighs all others.
    unit = 4 * EPS * (1 + getattr(energy, "t", 0))
    for actual, e, p in zip(run(x, y, energy, "triton"), exact, plain, strict=True):
        rounding = torch.finfo(x.dtype).eps if e.dim() > 0 and x.dtype != F32 else 0.0
        atol = max(unit, rounding) * max(e.abs().max().item(), 1 / len(x))
        assert_as_exact_as_torch(actual, e, p, atol=atol, name=str(energy))
        assert actual.dtype == p.dtype


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@each_energy
def test_matches_float64(energy, dtype):
    check(*points(N, None, D, dtype), energy)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@each_kind
def test_a_gallery_matches_float64(energy, dtype):
    check(*points(N, M, D, dtype), energy)


@each_kind
def test_float16_matches_float64(energy):
    check(*points(N, None, D, F16), energy)


@pytest.mark.parametrize("energy", [sk.LogSumExp(100.0), sk.MaxCosine()], ids=str)
def test_many_points_match_float64(energy):
    # The definition's gradient takes N·N·D float64 on a GPU, where torch.cdist's does.
    check(*points(*pick((6000, None, 32), (19, None, 16)), BF16), energy)


@pytest.mark.parametrize("gallery", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_neighbors_are_exact(dtype, gallery):
    x, y = points(N, M if gallery else None, D, dtype)
    for k in (1, 3):
        cosine, index = sk.nearest_neighbors(x, y, k, impl="triton")
        values, expected = sk.nearest_neighbors(x, y, k, impl="reference")
        assert (cosine - values).abs().max() <= EPS
        assert torch.equal(index, expected)


def test_neighbors_of_many_points_are_exact():
    x, _ = points(*pick((20_000, None, 512), (20, None, 16)), BF16)
    cosine, index = sk.nearest_neighbors(x, k=1, impl="triton")
    unit = torch.nn.functional.normalize(x.double())
    for start in range(0, len(x), 2000):  # N×N in float64 would be large
        rows = unit[start : start + 2000] @ unit.T
        own = torch.arange(start, start + len(rows), device=DEVICE)
        rows.scatter_(1, own[:, None], -2)
        best = rows.amax(1)
        found = rows.gather(1, index[start : start + 2000])[:, 0]
        assert (best - found).max() <= 1e-12
        assert (cosine[start : start + 2000, 0] - best).abs().max() <= EPS


@pytest.mark.parametrize("gallery", [False, True])
def test_ties_go_to_the_lowest_index(gallery):
    """All points are at two positions, so more cosines are equal than a row has room for."""
    count = pick(2000, 20)
    signs = torch.randint(0, 2, (count, 1), generator=rng(0), device=DEVICE) * 2.0 - 1
    y = signs[1:].clone() if gallery else None
    found = sk.nearest_neighbors(signs, y, 2, impl="triton")
    expected = sk.nearest_neighbors(signs, y, 2, impl="reference")
    assert_same(found, expected)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@each_kind
def test_two_runs_agree_bitwise(energy, dtype):
    x, _ = points(*pick((5000, None, 256), (8, None, 5)), dtype)
    assert_same(run(x, None, energy, "triton"), run(x, None, energy, "triton"))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@each_kind
def test_a_replayed_step_is_the_eager_one(energy, dtype):
    x, y = points(N, None, D, dtype)
    assert_same(replayed(lambda: run(x, y, energy, "triton")), run(x, y, energy, "triton"))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@each_kind
def test_a_step_never_waits_for_the_gpu(energy, dtype):
    x, y = points(N, M, D, dtype)
    assert_no_host_sync(lambda: run(x, y, energy, "triton"))


@each_kind
def test_another_device(energy):
    x, y = points(N, M, D, F32)
    on_another_device(lambda device: run(x.to(device), y.to(device), energy, "triton"))


@each_kind
def test_compile_fullgraph(energy):
    x, _ = points(N, None, D, F32)
    x.requires_grad_()
    loss = compiled(lambda x: sk.hypersphere_repulsion(x, energy=energy, impl="triton"))(x)
    results = [loss.detach(), *torch.autograd.grad(loss, x)]
    for actual, expected in zip(results, run(x.detach(), None, energy, "triton"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@each_kind
def test_a_group_of_one_process_is_no_group(energy):
    x, _ = points(N, None, D, F32)
    alone = run(x, None, energy, "triton")
    with one_process_group() as group:
        together = run(x, None, energy, "triton", group=group)
    for actual, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@each_kind
def test_peak_memory_is_a_workspace(energy, dtype):
    n, d = pick((20_000, 256), (9, 5))  # N×N in float32 would be 1.5 GiB
    x, _ = points(n, None, d, dtype)
    peak = peak_bytes(lambda: run(x, None, energy, "triton"))
    assert peak <= (160 << 20) + 16 * n * d
