"""Rows with very many nearly equal neighbors: a search in double decides, exactly."""

import pytest
import torch
import torch.nn.functional as F

import synface_kernels as sk


def nearly_equal(n, d, dtype, spread, seed=0):
    """Return points whose cosines to their neighbors differ by about `spread`, or not at all."""
    random = torch.Generator().manual_seed(seed)
    base = torch.randn(d, dtype=torch.float64, generator=random)
    noise = torch.randn(n, d, dtype=torch.float64, generator=random)
    return (F.normalize(base, dim=0) + spread**0.5 * F.normalize(noise)).to(dtype)


def differences(x, y):
    """Return 1 − r²/2 in double, which is exact near 1 too."""
    x, y = F.normalize(x.double()), F.normalize(y.double())
    return torch.stack([1 - (row - y).square().sum(1) / 2 for row in x])


def expected(x, y, k, kind):
    cosine = differences(x, x if y is None else y).to(kind)
    if y is None:
        cosine.fill_diagonal_(-2)
    found = cosine.sort(dim=1, descending=True, stable=True)
    return found.values[:, :k], found.indices[:, :k]


@pytest.mark.parametrize("gallery", [False, True])
@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_near_ties_are_decided_in_double(dtype, k, gallery):
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    x = nearly_equal(1100, 24, dtype, 1e-5)
    y = nearly_equal(1300, 24, dtype, 1e-5, 1) if gallery else None
    cosine, index = sk.nearest_neighbors(x, y, k, impl="cpu")
    values, order = expected(x, y, k, kind)
    if kind == torch.float64:  # last bits of two sums differ
        assert (cosine - values).abs().max() < 1e-15
        return
    assert torch.equal(cosine, values)
    assert torch.equal(index, order)


@pytest.mark.parametrize("copies", [30, 900, 2500])
def test_of_copies_the_first_is_taken(copies):
    """More of them than candidates are kept: such rows are compared with all points."""
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    rows = x.repeat_interleave(torch.tensor([copies, 2, 40]), 0)
    cosine, index = sk.nearest_neighbors(rows, impl="cpu")
    assert (cosine == 1).all()
    assert index[: copies + 2, 0].tolist() == [1, *[0] * (copies - 1), copies + 1, copies]
    assert index[copies + 2 :, 0].tolist() == [copies + 3, *[copies + 2] * 39]
    again, order = sk.nearest_neighbors(x, rows, 2, impl="cpu")
    assert (again == 1).all()
    assert order.tolist() == [[0, 1], [copies, copies + 1], [copies + 2, copies + 3]]


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_given_up_rows_are_the_same_for_any_threads(threads):
    """Fewer rows than threads times blocks, and more than are searched together."""
    before = torch.get_num_threads()
    signs = torch.randint(0, 2, (1500, 16), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    for rows in (signs, torch.cat([signs[:40], torch.randn(400, 16)])):
        values, order = expected(rows, None, 2, torch.float32)
        torch.set_num_threads(threads)
        try:
            cosine, index = sk.nearest_neighbors(rows, k=2, impl="cpu")
        finally:
            torch.set_num_threads(before)
        assert torch.equal(cosine, values)
        assert torch.equal(index, order)
