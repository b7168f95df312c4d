"""The neighbor search with a bfloat16 prefilter returns the bits of the one in float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import synface_kernels as sk
from synface_kernels import _load
from tests.helpers import codes

BF16 = [isa for isa in _load.cpu_isas() if isa.endswith("bf16")]
pytestmark = pytest.mark.skipif(not BF16, reason="this processor has no bfloat16 instructions")


def noise(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def lattice(n: int, d: int, seed: int) -> Tensor:
    rows = noise(n, d, seed).round()
    rows[:, 0] += 3 * (rows == 0).all(1)
    return rows


def clustered(n: int, d: int, seed: int, width: float = 0.1) -> Tensor:
    return noise(n // 20 + 1, d, seed + 1).repeat(20, 1)[:n] + width * noise(n, d, seed)


def duplicated(n: int, d: int, seed: int) -> Tensor:
    return noise(n // 2 + 1, d, seed).repeat(2, 1)[:n]


def in_a_cone(n: int, d: int, seed: int) -> Tensor:
    """Return points whose cosines differ by far less than a bfloat16 rounding error."""
    return 1 + 1e-4 * noise(n, d, seed)


def beside_midpoints(n: int, d: int, seed: int) -> Tensor:
    """Return coordinates just beside the midpoint of two bfloat16 numbers, so that errors add up.

    A point's coordinates are all on one side of the midpoint, or on both.
    """
    middle = (1 + 2**-8) * 2 ** -round(1 + torch.tensor(d).log2().item() / 2)
    above = noise(n, 1, seed).sign() if seed % 2 else noise(n, d, seed).sign()
    rows = middle * (1 + 1e-4 * above * noise(n, d, seed + 1).abs())
    return torch.cat([rows, (1 - rows.square().sum(1, keepdim=True)).sqrt()], 1)


def of_all_sizes(n: int, d: int, seed: int) -> Tensor:
    """Return points with norms from 1e-11 to 1e19, some coordinates subnormal in bfloat16."""
    generator = torch.Generator().manual_seed(seed + 3)
    rows = noise(n, d, seed) * 10 ** (10 * noise(n, d, seed + 2).clamp(-2, 0))
    norms = 10 ** (30 * torch.rand(n, 1, generator=generator) - 11)
    return F.normalize(rows, eps=1e-30) * norms


KINDS = [noise, lattice, clustered, duplicated, in_a_cone, beside_midpoints, of_all_sizes]


def search(isa: str, x: Tensor, y: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SYNFACE_CPU_ISA", isa)
        return sk.nearest_neighbors(x, y, k, impl="cpu")


def assert_same(x: Tensor, y: Tensor | None, k: int) -> None:
    expected_cosine, expected = search("avx512", x, y, k)
    for isa in BF16:
        cosine, index = search(isa, x, y, k)
        assert torch.equal(index, expected)
        assert torch.equal(cosine, expected_cosine)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gallery", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_same_neighbors(kind, gallery, dtype):
    for n, m, d, k in ((900, 700, 33, 1), (1300, 257, 128, 4), (650, 1030, 7, 20)):
        x, y = kind(n, d, n).to(dtype), kind(m, d, m).to(dtype) if gallery else None
        if kind is of_all_sizes and dtype == torch.float16:
            x, y = x / x.norm(dim=1, keepdim=True), None
            if not x.isfinite().all():
                continue
        assert_same(x, y, k)


@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(2, 1100),
    m=st.one_of(st.none(), st.integers(1, 1100)),
    d=st.integers(1, 80),
    k=st.integers(1, 300),
    seed=st.integers(0, 2**20),
)
@pytest.mark.slow
def test_any_points(kind, n, m, d, k, seed):
    y = None if m is None else kind(m, d, seed + 7)
    assert_same(kind(n, d, seed), y, min(k, n - 1 if m is None else m))


def test_rounding_against_the_nearest():
    """Rounding moves the nearest neighbor away and the second nearest closer.

    Dot products of the rounded vectors have the wrong order.
    """
    d, n = 100, 1000
    middle = (1 + 2**-8) * 2**-4
    rows = noise(n, d, 0) / 20
    rows[0] = middle * (1 + 2e-3)
    rows[700] = middle * (1 - 2e-4)
    x = torch.full((1, d), middle * (1 - 4e-4))

    def unit(rows: Tensor) -> Tensor:
        return torch.cat([rows, (1 - rows.double().square().sum(1, keepdim=True)).sqrt()], 1)

    x, y = unit(x).float(), unit(rows).float()
    rounded = F.normalize(y).bfloat16().double() @ F.normalize(x).bfloat16().double()[0]
    assert rounded[700] < rounded[0] - 1e-3
    assert search(BF16[0], x, y, 1)[1].item() == 700
    assert_same(x, y, 3)
    assert_same(torch.cat([y, x]), None, 3)


def test_packed_points():
    """Packed points have hundreds of neighbors nearly as near as the nearest."""
    x = F.normalize(noise(1200, 48, 0)).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        sk.hypersphere_repulsion(x, energy=sk.LogSumExp(t=200.0)).backward()
        optimizer.step()
    for k in (1, 8):
        assert_same(x.detach(), None, k)


@pytest.mark.slow
def test_kerdock():
    assert_same(codes.KERDOCK_64.points().float(), None, 1)


def test_gradients_are_the_same():
    x = noise(1000, 40, 3).requires_grad_()
    grads = []
    for isa in ("avx512", *BF16):
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("SYNFACE_CPU_ISA", isa)
            loss = sk.hypersphere_repulsion(x, energy=sk.MaxCosine(topk=2))
            grads.append(torch.autograd.grad(loss, x)[0])
    assert all(torch.equal(grad, grads[0]) for grad in grads)


def test_large_dimensions():
    """The kernel splits a large, odd D into slices."""
    assert_same(noise(600, 1537, 1), None, 2)
    assert_same(clustered(600, 2049, 1), noise(300, 2049, 2), 1)
