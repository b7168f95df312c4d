"""No code beats a bound, the best codes attain it, and expected values agree with simulation."""

import itertools
import math

import numpy as np
import pytest
import torch
from synface.synthesis.packing import bounds

from tests.helpers import codes


def worst(points: torch.Tensor) -> float:
    cosines = points @ points.T
    return cosines.fill_diagonal_(-2).max().item()


@pytest.mark.parametrize("name", [*codes.SMALL, "Kerdock 64"])
def test_the_constructions_are_what_they_say(name):
    code = codes.SMALL.get(name, codes.KERDOCK_64)
    points = code.points()
    assert points.shape == (code.count, code.dim)
    assert (points.norm(dim=1) - 1).abs().max() < 1e-12
    assert worst(points) == pytest.approx(code.worst, abs=1e-12)
    assert bounds.best(code.count, code.dim).cosine <= code.worst + 1e-12


def test_the_largest_kerdock_code_by_its_signs():
    """Two bases H·s_u and H·s_v are unbiased where the spectrum of s_u·s_v is flat."""
    signs = codes.kerdock_signs(8)
    assert signs.shape == (128, 256)
    u, v = torch.triu_indices(128, 128, 1)
    spectrum = (signs[u] * signs[v]) @ codes.hadamard(256)
    assert torch.equal(spectrum.abs(), torch.full_like(spectrum, 16.0))
    code = codes.KERDOCK_256
    assert code.count == (128 + 1) * 256 * 2
    assert bounds.best(code.count, code.dim).cosine <= code.worst
    assert bounds.best(code.count, code.dim).cosine == pytest.approx(code.worst, rel=0.01)


@pytest.mark.parametrize(
    ("name", "whose"),
    [
        ("simplex", "Rankin"),
        ("orthoplex", "Rankin"),
        ("icosahedron", "Levenshtein"),
        ("16 in 5", "Levenshtein"),
        ("27 in 6", "Levenshtein"),
        ("56 in 7", "Levenshtein"),
        ("E8", "Levenshtein"),
    ],
)
def test_these_codes_are_optimal(name, whose):
    code = codes.SMALL[name]
    bound = bounds.best(code.count, code.dim)
    assert bound.cosine == pytest.approx(code.worst, abs=1e-12)
    by_name = {"Rankin": bounds.rankin, "Levenshtein": bounds.levenshtein}
    assert by_name[whose](code.count, code.dim) == pytest.approx(code.worst, abs=1e-12)


@pytest.mark.parametrize(
    ("count", "dim", "cosine"),
    [
        (196560, 24, 1 / 2),  # the Leech lattice's shortest vectors, and codes derived from it
        (4600, 23, 1 / 3),
        (891, 22, 1 / 4),
        (552, 23, 1 / 5),
        (275, 22, 1 / 6),
        (162, 21, 1 / 7),
        (100, 22, 1 / 11),
        (112, 21, 1 / 9),
    ],
)
def test_levenshtein_is_sharp_on_the_known_sharp_codes(count, dim, cosine):
    assert bounds.levenshtein(count, dim) == pytest.approx(cosine, abs=1e-12)


def test_levenshtein_at_ten_thousand_embeddings():
    assert bounds.levenshtein(10_000, 512) == pytest.approx(0.0238, abs=5e-5)


@pytest.mark.parametrize("dim", [3, 4, 8, 16, 100, 512])
def test_levenshtein_rises_with_the_number_of_points(dim):
    counts = sorted({*range(2, 60), *(int(1.3**i) for i in range(16, 50))})
    found = [bounds.levenshtein(count, dim) for count in counts]
    assert all(a < b < 1 for a, b in itertools.pairwise(found))
    assert found[0] == pytest.approx(-1, abs=1e-12)
    assert bounds.levenshtein(dim + 1, dim) == pytest.approx(-1 / dim, abs=1e-12)
    assert bounds.levenshtein(2 * dim, dim) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("count", "angle"), codes.TAMMES.items())
def test_no_bound_exceeds_the_proven_optimum_in_space(count, angle):
    optimum = math.cos(math.radians(angle))
    assert bounds.best(count, 3).cosine <= optimum + 2e-6  # angles are given to 1e-4 degrees
    if count in (4, 6, 12):
        assert bounds.fejes_toth(count) == pytest.approx(optimum, abs=2e-6)


@pytest.mark.parametrize("count", [2, 3, 7, 1000])
def test_the_plane_is_exact(count):
    cosine = math.cos(2 * math.pi / count)
    assert bounds.best(count, 2).cosine == pytest.approx(cosine, abs=1e-15)
    assert bounds.levenshtein(count, 2) == pytest.approx(cosine, abs=1e-15)


@pytest.mark.parametrize(
    ("count", "dim", "absolute"),
    [(7, 7, 0), (6, 3, 5**-0.5), (28, 7, 1 / 3), (276, 23, 1 / 5)],
)
def test_welch_is_reached_by_equiangular_lines_and_is_about_lines(count, dim, absolute):
    assert bounds.welch(count, dim) == pytest.approx(absolute, abs=1e-12)
    assert bounds.welch(16, 8) > codes.SMALL["orthoplex"].worst  # so it is no bound on points


def test_welch_holds_for_every_code_here():
    for code in codes.SMALL.values():
        points = code.points()
        cosines = (points @ points.T).fill_diagonal_(0)
        assert bounds.welch(code.count, code.dim) <= cosines.abs().max().item() + 1e-12


@pytest.mark.parametrize(("count", "dim"), [(2, 3), (50, 3), (200, 8), (500, 64), (1000, 16)])
def test_random_points_are_as_bad_as_expected(count, dim):
    generator = torch.Generator().manual_seed(count)
    repeats = 400 if count <= 200 else 60
    seen = []
    for _ in range(repeats):
        points = torch.randn(count, dim, dtype=torch.float64, generator=generator)
        seen.append(worst(points / points.norm(dim=1, keepdim=True)))
    mean, error = np.mean(seen), np.std(seen) / repeats**0.5
    assert abs(bounds.random_worst(count, dim) - mean) < 4 * error


def test_nearest_neighbors_of_random_points():
    count, dim = 400, 16
    generator = torch.Generator().manual_seed(1)
    nearest = []
    for _ in range(20):
        points = torch.randn(count, dim, dtype=torch.float64, generator=generator)
        points /= points.norm(dim=1, keepdim=True)
        nearest.append((points @ points.T).fill_diagonal_(-2).amax(1))
    edges = np.linspace(0.2, 1, 17)
    found = (torch.cat(nearest).numpy()[:, None] <= edges).mean(0)
    assert np.abs(found - bounds.random_nearest_cdf(edges, count, dim)).max() < 0.02
    ends = bounds.random_nearest_cdf(np.array([-1.0, 1.0]), count, dim)
    assert ends == pytest.approx([0, 1], abs=1e-12)


@pytest.mark.parametrize("name", ["best", "rankin", "welch", "levenshtein", "random_worst"])
def test_bad_arguments(name):
    function = getattr(bounds, name)
    with pytest.raises(ValueError, match="count must be at least 2, got 1"):
        function(1, 3)
    with pytest.raises(ValueError, match="dim must be at least 2, got 1"):
        function(5, 1)
    with pytest.raises(TypeError, match="count must be an int, got float"):
        function(5.0, 3)
