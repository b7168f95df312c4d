"""Points spread over the ranks of a process group give what one rank gives."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import synface_kernels as sk

PAIR = [
    sk.LogSumExp(),
    sk.LogSumExp(t=800.0),
    sk.Gaussian(),
    sk.Riesz(2.0),
    sk.Log(),
    sk.Hinge(0.1),
]


def points(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(61, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(
        dtype
    )


def shares(ranks: int, uneven: bool) -> list[int]:
    """How many points each rank holds; unevenly: one of them, and none, too."""
    if uneven:
        return [60, 1, 0, 0][:ranks]
    return [61 * (r + 1) // ranks - 61 * r // ranks for r in range(ranks)]


def rank_main(rank: int, ranks: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)
    results = {}
    for dtype in (torch.float64, torch.float32):
        for uneven in (False, True):
            x = points(dtype).split(shares(ranks, uneven))[rank].clone().requires_grad_()
            for energy in PAIR:
                for reduction in ("mean", "sum"):
                    loss = sk.hypersphere_repulsion(
                        x, energy=energy, reduction=reduction, group=dist.group.WORLD
                    )
                    (grad,) = torch.autograd.grad(2 * loss, x)
                    with torch.no_grad():
                        alone = sk.hypersphere_repulsion(
                            x, energy=energy, reduction=reduction, group=dist.group.WORLD
                        )
                    assert alone == loss
                    results[dtype, uneven, energy, reduction] = loss.detach(), grad
    torch.save(results, f"{path}.{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_equal_one(ranks, tmp_path):
    path = str(tmp_path / "group")
    mp.spawn(rank_main, (ranks, path), nprocs=ranks)
    with torch.serialization.safe_globals([sk.LogSumExp, sk.Gaussian, sk.Riesz, sk.Log, sk.Hinge]):
        results = [torch.load(f"{path}.{r}", weights_only=True) for r in range(ranks)]
    assert len(results[0]) == 2 * 2 * len(PAIR) * 2
    for key, (loss, _) in results[0].items():
        dtype, _, energy, reduction = key
        x = points(dtype).requires_grad_()
        expected = sk.hypersphere_repulsion(x, energy=energy, reduction=reduction)
        (grad,) = torch.autograd.grad(2 * expected, x)
        tolerance = 1e-12 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(loss, expected.detach(), rtol=tolerance, atol=0)
        assert all(torch.equal(r[key][0], loss) for r in results)
        sharded = torch.cat([r[key][1] for r in results])
        error = (sharded - grad).abs().max() / grad.abs().max()
        assert error <= tolerance, (key, error)


def test_what_is_not_built():
    x = torch.eye(4)
    group = object()
    with pytest.raises(NotImplementedError, match="group is built for energies of all pairs"):
        sk.hypersphere_repulsion(x, energy=sk.MaxCosine(), group=group)
    with pytest.raises(NotImplementedError, match="LogSumExp with y"):
        sk.hypersphere_repulsion(x, x, group=group)
    with pytest.raises(ValueError, match="'cpu' or 'triton' with a group"):
        sk.hypersphere_repulsion(x, group=group, impl="reference")
