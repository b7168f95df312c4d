"""Points sharded over the ranks of a process group give the results of a single process."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist

import synface_kernels as sk
from tests.helpers.ranks import on_ranks

N, M, D = 61, 9, 7
ENERGIES = [
    sk.LogSumExp(),
    sk.LogSumExp(t=800.0),
    sk.Gaussian(),
    sk.Riesz(2.0),
    sk.Log(),
    sk.Hinge(0.1),
    sk.MaxCosine(),
    sk.MaxCosine(topk=5),
    sk.ClosestPair(),
    sk.KoLeo(),
]
NEAREST = (sk.MaxCosine, sk.ClosestPair, sk.KoLeo)  # the energies that choose among equals
PER_POINT = (sk.MaxCosine, sk.KoLeo)
CASES = [
    *itertools.product([torch.float64], ["apart"], (False, True), ENERGIES, ["mean", "sum"]),
    *itertools.product([torch.float32], ["lattice"], (False, True), ENERGIES, ["mean"]),
    *itertools.product(
        [torch.float64],
        ["lattice"],
        (False, True),
        [energy for energy in ENERGIES if isinstance(energy, NEAREST)],
        ["mean"],
    ),
    *itertools.product(
        [torch.float64],
        ["apart"],
        (False, True),
        [energy for energy in ENERGIES if isinstance(energy, PER_POINT)],
        ["none"],
    ),
]  # dtype, kind of points, gallery, energy, reduction
# A sum differs from a mean by a factor after all that the ranks exchange, so even shares suffice.
CASES = [(False, *case) for case in CASES] + [(True, *case) for case in CASES if case[-1] != "sum"]


def points(kind: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x and y; on the lattice many distances are equal, and some points coincide."""
    generator = torch.Generator().manual_seed(0)
    if kind == "apart":
        rows = torch.randn(N + M, D, generator=generator, dtype=torch.float64)
    else:
        rows = torch.randint(-1, 2, (N + M, D), generator=generator).double()
        rows[:, 0] += 3 * (rows == 0).all(1)
        rows[[20, 31, 60, N + 2]] = rows[0].clone()
        rows[[30, 58, N + 5]] = rows[[29, 40, 59]]
    return rows[:N].to(dtype), rows[N:].to(dtype)


def shares(ranks: int, uneven: bool) -> list[int]:
    """Return the number of points of each rank; uneven ones include one and none."""
    if uneven:
        return [60, 1, 0, 0][:ranks]
    return [N * (r + 1) // ranks - N * r // ranks for r in range(ranks)]


def objective(loss: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Return a weighted sum of a rank's energies, so that each has a gradient of its own."""
    weights = 2 + torch.arange(first, first + loss.numel(), dtype=loss.dtype) / N
    return (loss.flatten() * weights).sum()


def results_of(rank: int, ranks: int) -> tuple[list, list]:
    return energies(rank, ranks), neighbors(rank, ranks)


def energies(rank: int, ranks: int) -> list:
    group, results = dist.group.WORLD, []
    for uneven, dtype, kind, gallery, energy, reduction in CASES:
        counts = shares(ranks, uneven)
        x, y = points(kind, dtype)
        x = x.split(counts)[rank].clone().requires_grad_()
        y = y.requires_grad_() if gallery else None
        options = {"energy": energy, "reduction": reduction, "group": group}
        loss = sk.hypersphere_repulsion(x, y, **options)
        scalar = objective(loss, sum(counts[:rank]) if reduction == "none" else 0)
        grads = torch.autograd.grad(scalar, (x, y) if gallery else (x,))
        if not uneven and dtype == torch.float64:
            with torch.no_grad():
                assert torch.equal(sk.hypersphere_repulsion(x, y, **options), loss)
        results.append((loss.detach(), *grads))
    return results


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.slow
def test_ranks_equal_one(ranks, tmp_path):
    energies, neighbors = zip(*on_ranks(ranks, results_of, tmp_path), strict=True)
    check_energies(energies)
    check_neighbors(neighbors)


def check_energies(results: tuple[list, ...]) -> None:
    assert all(len(rank) == len(CASES) for rank in results)
    for at, case in enumerate(CASES):
        _, dtype, kind, gallery, energy, reduction = case
        x, y = points(kind, dtype)
        inputs = (x.requires_grad_(), y.requires_grad_()) if gallery else (x.requires_grad_(),)
        expected = sk.hypersphere_repulsion(*inputs, energy=energy, reduction=reduction)
        grads = torch.autograd.grad(objective(expected), inputs)

        losses, x_grads, *y_grads = zip(*(rank[at] for rank in results), strict=True)
        if reduction == "none":
            losses = [torch.cat(losses)]
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(losses[0], expected.detach(), rtol=tolerance, atol=0)
        assert all(torch.equal(loss, losses[0]) for loss in losses), case
        sharded = [torch.cat(x_grads)]
        if gallery:
            assert all(torch.equal(grad, y_grads[0][0]) for grad in y_grads[0]), case
            sharded.append(y_grads[0][0])
        for got, grad in zip(sharded, grads, strict=True):
            assert got.dtype == dtype
            error = (got - grad).abs().max() / grad.abs().max()
            assert error <= tolerance, (case, error)


def neighbors(rank: int, ranks: int) -> list:
    results = []
    for uneven, k, gallery in itertools.product((False, True), (1, M), (False, True)):
        x, y = points("lattice", torch.float32)
        x = x.split(shares(ranks, uneven))[rank]
        results.append(sk.nearest_neighbors(x, y if gallery else None, k, group=dist.group.WORLD))
    own = many().tensor_split(ranks)[rank]
    results.append(sk.nearest_neighbors(own, k=3, group=dist.group.WORLD))
    return results


def many() -> torch.Tensor:
    """Return enough points for several blocks per rank."""
    return torch.randn(1400, 24, generator=torch.Generator().manual_seed(1))


def check_neighbors(results: tuple[list, ...]) -> None:
    x, y = points("lattice", torch.float32)
    for at, (_, k, gallery) in enumerate(itertools.product((0, 1), (1, M), (False, True))):
        cosine, index = sk.nearest_neighbors(x, y if gallery else None, k)
        assert torch.equal(torch.cat([rank[at][0] for rank in results]), cosine)
        assert torch.equal(torch.cat([rank[at][1] for rank in results]), index)
    for got, expected in zip(
        zip(*(rank[-1] for rank in results), strict=True),
        sk.nearest_neighbors(many(), k=3),
        strict=True,
    ):
        assert torch.equal(torch.cat(got), expected)


BAD = [
    (
        "rank 1: x must have finite, non-zero rows (norms above 1e-12), got a norm of 0 in row 2",
        ValueError,
    ),
    ("rank 1: x must be a tensor", TypeError),
    ("D must be the same on all ranks, got [4, 3]", ValueError),
    ("requires_grad of x must be the same on all ranks", ValueError),
    ("energy must be the same on all ranks", ValueError),
    ("y must be the same on all ranks", ValueError),
    ("energy's topk must be at least 1 and at most 7", ValueError),
    ("rank 1: x (N, D) and y (M, D) must have the same D", ValueError),
    ("x must have at least 2 rows, on all ranks together, got 0", ValueError),
    ("rank 0: impl must be 'cpu' or 'triton' with a group, got 'reference'", ValueError),
]


def mistakes(rank: int, ranks: int) -> list:
    x, wrong = 1 + torch.eye(4), rank == 1
    zero = x.clone()
    zero[2] = 0
    calls = [
        {"x": zero if wrong else x},
        {"x": [1.0] if wrong else x},
        {"x": x[:, :3] if wrong else x},
        {"x": x.clone().requires_grad_(wrong)},
        {"x": x, "energy": sk.Log() if wrong else sk.KoLeo()},
        {"x": x, "y": x + rank},
        {"x": x, "energy": sk.MaxCosine(topk=8)},
        {"x": x, "y": x[:, :3] if wrong else x},
        {"x": x[:0]},
        {"x": x, "impl": "reference"},
    ]
    messages = []
    for call, (_, kind) in zip(calls, BAD, strict=True):
        with pytest.raises(kind) as error:
            sk.hypersphere_repulsion(**call, group=dist.group.WORLD)
        messages.append(str(error.value))
    return messages


def test_all_ranks_raise_the_error_of_one(tmp_path):
    results = on_ranks(2, mistakes, tmp_path)
    assert results[0] == results[1]
    for message, (expected, _) in zip(results[0], BAD, strict=True):
        assert message.startswith(expected)


def test_group_must_be_one():
    with pytest.raises(TypeError, match=r"group must be a .* process group, got int"):
        sk.hypersphere_repulsion(torch.eye(4), group=3)
