"""The closest pairs, and those above a threshold, against all pairs in float64; the check."""

from __future__ import annotations

import csv
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from synface.synthesis.packing import (
    bounds,
    closest_pair,
    closest_pairs,
    nearest_cosines,
    pairs,
    pairs_above,
)
from torch import Tensor
from torch.nn.functional import normalize

from tests.helpers import codes
from tests.helpers.command_line import call, refused

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def rows(count: int, dim: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def brute(x: Tensor, y: Tensor | None = None) -> list[tuple[float, int, int]]:
    """Return all pairs in order, by cosines in double, rounded as those of neighbors are."""
    left = normalize(x.double())
    right = left if y is None else normalize(y.double())
    cosine = 1 - (left[:, None] - right).square().sum(2) / 2
    cosine = cosine.to(x.dtype if x.dtype == torch.float64 else torch.float32).double()
    i, j = (torch.triu(torch.ones_like(cosine), 1) if y is None else cosine + 2).nonzero().T
    order = np.lexsort((j, i, -cosine[i, j].numpy()))
    cosines = cosine[i, j][order].tolist()
    return list(zip(cosines, i[order].tolist(), j[order].tolist(), strict=True))


def alike(found, wanted, dtype):
    """Assert that pairs are the same, in order; of float64 ones, cosines to the last bits."""
    assert [pair[1:] for pair in found] == [pair[1:] for pair in wanted]
    tolerance = 1e-15 if dtype == torch.float64 else 0
    assert [pair.cosine for pair in found] == pytest.approx(
        [pair[0] for pair in wanted], rel=0, abs=tolerance
    )


@pytest.fixture(params=[False, True], ids=["one tile", "small tiles"])
def tiles(request, monkeypatch):
    """Make tiles and blocks as small as they get, or leave them."""
    if request.param:
        monkeypatch.setattr(pairs, "TILE_ROWS", 7)
        monkeypatch.setattr(pairs, "TILE_NUMBERS", 100)
        monkeypatch.setattr(pairs, "BLOCK", 500)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("across", [False, True])
def test_the_closest_pairs_are_those_of_all_pairs(tiles, dtype, across):
    x, y = rows(60, 5, 0, dtype), None
    x[30:40], x[50] = x[3], 2 * x[7]  # copies, and one of another length
    if across:
        y = rows(45, 5, 1, dtype)
        y[10:20] = x[3]
    wanted = brute(x, y)
    for count in (1, 2, 9, 30, 100, 700, len(wanted), len(wanted) + 5):
        alike(closest_pairs(x, y, count), wanted[:count], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("across", [False, True])
def test_the_count_above_a_threshold_is_exact(tiles, dtype, across):
    x, y = rows(60, 5, 0, dtype), None
    x[30:40], x[50] = x[3], 2 * x[7]
    if across:
        y = rows(45, 5, 1, dtype)
        y[10:20] = x[3]
    nearest = nearest_cosines(x, y)
    known = closest_pairs(x, y, 10**6, nearest=nearest)
    at = [known[index].cosine for index in (0, 50, 200, -1)]
    beside = [float(np.nextafter(each, way)) for each in at for way in (-1, 1)]
    for threshold in (-1.0, 0.0, 0.5, 1.0, *at, *beside):
        wanted = [pair for pair in known if pair.cosine > threshold]
        found = pairs_above(x, y, threshold, 7, nearest=nearest)
        assert found == (len(wanted), wanted[:7]), threshold
    assert pairs_above(x, y, -1.0, 0) == (len(known), [])


def test_ties_of_many_points_are_in_the_order_of_their_indices(tiles):
    for code in (torch.eye(30), codes.cell_600().float()):
        wanted = brute(code)
        ties = sum(pair[0] == wanted[0][0] for pair in wanted)
        assert ties > 200
        for count in (1, 10, ties - 1, ties, ties + 1):
            alike(closest_pairs(code, None, count), wanted[:count], torch.float32)
        assert pairs_above(code, None, wanted[0][0], 5) == (0, [])
        below = float(np.nextafter(np.float32(wanted[0][0]), np.float32(-1)))
        assert pairs_above(code, None, below, 5).total == ties


def test_equal_rows_are_all_pairs_at_one(tiles):
    same = torch.full((40, 3), 0.7)
    assert closest_pairs(same, None, 3) == [(1.0, 0, 1), (1.0, 0, 2), (1.0, 0, 3)]
    assert closest_pairs(same, same[:4], 3) == [(1.0, 0, 0), (1.0, 0, 1), (1.0, 0, 2)]
    assert pairs_above(same, None, 1.0, 3).total == 0
    assert pairs_above(same, None, 0.9999999, 1) == (780, [(1.0, 0, 1)])
    assert pairs_above(same, same[:4], 0.9999999, 0).total == 160
    assert torch.equal(nearest_cosines(same), torch.ones(40))


def test_the_first_is_the_closest_pair_and_lengths_do_not_matter():
    x, y = rows(300, 16, 2), rows(200, 16, 3)
    for other in (None, y):
        cosine, found = closest_pair(x, other)
        assert closest_pairs(x, other) == [(cosine, *found)]
    scaled = closest_pairs(x * 2.0**120, y * 2.0**-30, 20)
    assert scaled == closest_pairs(x, y, 20)
    assert closest_pairs(x.double() * 1e250, None, 20)[19].j == closest_pairs(x, None, 20)[19].j


def test_torchs_precision_of_matrix_products_changes_nothing():
    x = rows(400, 64, 4)
    wanted = closest_pairs(x, None, 50), pairs_above(x, None, 0.3, 50)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert (closest_pairs(x, None, 50), pairs_above(x, None, 0.3, 50)) == wanted
    finally:
        torch.set_float32_matmul_precision(before)


def test_known_neighbors_and_progress(tiles):
    x, told = rows(60, 5, 0), []
    nearest = nearest_cosines(x, progress=lambda *done: told.append(done))
    assert told[-1] == (60, 60)
    assert torch.equal(nearest, nearest_cosines(x))
    assert closest_pairs(x, None, 9, nearest=nearest) == closest_pairs(x, None, 9)
    assert pairs_above(x, None, 0.5, 9, nearest=nearest) == pairs_above(x, None, 0.5, 9)
    told.clear()
    pairs_above(x, None, -1, 0, nearest=nearest, progress=lambda *done: told.append(done))
    assert told[-1] == (60, 60)
    for wrong in (nearest[1:], nearest.double()):
        with pytest.raises(ValueError, match="nearest must be what nearest_cosines returns"):
            closest_pairs(x, nearest=wrong)


def test_arguments_are_checked():
    x = rows(6, 3, 0)
    for function in (closest_pairs, nearest_cosines, lambda *a: pairs_above(*(*a, None)[:2], 0, 1)):
        with pytest.raises(TypeError, match="points must be a tensor, got list"):
            function([1.0])
        with pytest.raises(ValueError, match=r"points must be floating .*\(N, D\), got int64"):
            function(x.long())
        with pytest.raises(ValueError, match=r"other must be floating point of shape \(M, D\)"):
            function(x, x[0])
        with pytest.raises(ValueError, match="must have the same dimension, got 3 and 2"):
            function(x, x[:, :2])
        with pytest.raises(ValueError, match="at least 2 rows without other, got 1"):
            function(x[:1])
        with pytest.raises(ValueError, match="row 2"):
            function(x.clone().index_fill_(0, torch.tensor([2]), 0))
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        closest_pairs(x, None, 0)
    with pytest.raises(ValueError, match=r"threshold must be in \[-1, 1\], got 1.5"):
        pairs_above(x, None, 1.5, 1)
    with pytest.raises(ValueError, match="limit must be at least 0, got -1"):
        pairs_above(x, None, 0.5, -1)


# ---- the command line ----------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Write two files of embeddings, with a copy of a row of the first in the second."""
    monkeypatch.chdir(tmp_path)
    a, b = rows(50, 8, 5), rows(30, 8, 6)
    b[4] = 3 * a[17]
    np.save("a.npy", a.numpy())
    save_file({"embeddings": b}, "b.safetensors")
    return a, b


def table(path="pairs.csv"):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_check_lists_and_writes_the_closest_pairs(files):
    a, b = files
    wanted = closest_pairs(a, None, 4)
    shown = call("pack", "--check", "a.npy", "--top", 4, "--csv", "pairs.csv").splitlines()
    first = wanted[0]
    assert shown[0] == (
        f"worst cosine {first.cosine:.6f}: row {first.i} of a.npy and row {first.j} of a.npy"
    )
    for rank, (pair, line) in enumerate(zip(wanted[1:], shown[1:], strict=False), 2):
        assert line == f"{rank}. cosine {pair.cosine:.6f}: row {pair.i} and row {pair.j}"
    assert shown[4].startswith("50 points in 8 dimensions: bound ")
    assert shown[5:] == ["written: pairs.csv"]
    header, *found = table()
    assert header == ["rank", "cosine", "first_row", "second_row"]
    assert [(float(c), int(i), int(j)) for _, c, i, j in found] == wanted
    assert [row[0] for row in found] == ["1", "2", "3", "4"]
    shown = call("pack", "--check", "a.npy", "--against", "b.safetensors").splitlines()
    assert shown == ["worst cosine 1.000000: row 17 of a.npy and row 4 of b.safetensors"]
    assert len(call("pack", "--check", "a.npy", "--top", 2000).splitlines()) == 1225 + 1


def test_check_fails_above_a_threshold(files):
    a, b = files
    known = closest_pairs(a, b, 1500)
    at = known[8].cosine
    arguments = ["pack", "--check", "a.npy", "--against", "b.safetensors", "--csv", "pairs.csv"]
    shown = call(*arguments, "--threshold", at, code=1)
    assert f"pairs with a cosine above {at:g}: 8 of 1,500" in shown
    assert [(float(c), int(i), int(j)) for _, c, i, j in table()[1:]] == known[:8]
    shown = call(*arguments, "--threshold", 1, "--overwrite")
    assert "pairs with a cosine above 1: 0 of 1,500" in shown
    assert table() == [["rank", "cosine", "first_row", "second_row"]]


def test_a_table_of_pairs_is_capped(files, monkeypatch):
    monkeypatch.setattr("synface.cli.checking.MOST", 10)
    shown = call("pack", "--check", "a.npy", "--threshold", 0, "--csv", "pairs.csv", code=1)
    assert "pairs.csv has the closest 10 of these pairs" in shown
    assert len(table()) == 11


def test_check_plots_neighbors_beside_random_points(files, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "synface.synthesis.packing.plot.densities",
        lambda curves, path, **options: drawn.append((curves, options["lines"])),
    )
    call("pack", "--check", "a.npy", "--plot", "a.png", "--threshold", 1)
    call("pack", "--check", "a.npy", "--plot", "a.png", "--against", "b.safetensors")
    bound = bounds.best(50, 8)
    assert drawn[0][1] == {f"{bound.name} bound {bound.cosine:.4f}": bound.cosine, "threshold 1": 1}
    assert drawn[1][1] == {}
    for curves, _ in drawn:
        assert set(curves) == {"these rows", "random points"}
        for density, edges in curves.values():
            assert (density * np.diff(edges)).sum() == pytest.approx(1, abs=2e-3)
    monkeypatch.undo()


def test_the_plot_is_a_picture(files):
    call("pack", "--check", "a.npy", "--plot", "a.png")
    np.save("line.npy", np.array([[1.0], [-2.0], [3.0]], np.float32))
    call("pack", "--check", "line.npy", "--plot", "line.png")  # random points are drawn in none
    for name in ("a.png", "line.png"):
        with Image.open(name) as picture:
            assert min(picture.size) > 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--check", "a.npy", "--threshold", "2"], r"--threshold must be in \[-1, 1\], got 2"),
        (["--check", "a.npy", "--threshold", "nan"], r"--threshold must be in \[-1, 1\], got nan"),
        (["--check", "a.npy", "--top", "0"], "--top"),
        (["--check", "a.npy", "--csv", "there.csv"], "there.csv exists: .*--overwrite"),
        (["--check", "a.npy", "--csv", "folder"], "folder is a folder"),
        (["--check", "a.npy", "--csv", "a.npy/x.csv"], "the folder of x.csv must be a folder"),
        (["--check", "a.npy", "--plot", "a.pdf"], "--plot must be a .png file, got a.pdf"),
        (["--check", "a.npy", "--overwrite"], "--overwrite has no effect with --check, but"),
        (["--count", "4", "--dim", "2", "--top", "2"], "--top has no effect without --check"),
        (["--count", "4", "--dim", "2", "--csv", "x"], "--csv has no effect without --check"),
    ],
)
def test_errors_of_the_check_are_one_line(files, tmp_path, arguments, message):
    (tmp_path / "there.csv").write_text("kept")
    (tmp_path / "folder").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    shown = refused("pack", *arguments)
    assert re.search(message, shown)
    assert "Traceback" not in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "there.csv").read_text() == "kept"
