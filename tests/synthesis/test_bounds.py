"""No code beats a bound, the best codes attain it, and expected values agree with simulation."""

import itertools
import math

import numpy as np
import pytest
import torch
from synface.synthesis.packing import PackConfig, bounds, delsarte

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


# -- Delsarte's linear program


@pytest.mark.parametrize(
    ("dim", "published"),
    [(3, 13.158), (4, 25.558), (5, 46.338), (6, 82.631), (7, 140.162), (8, 240), (24, 196560)],
)
def test_the_kissing_numbers_bounds_are_the_published_ones(dim, published):
    found = delsarte.size(0.5, dim)
    assert found == pytest.approx(published, abs=6e-4, rel=1e-6)
    if dim in (8, 24):
        assert published <= found  # sharp: a smaller number would not be a bound


@pytest.mark.parametrize("dim", [3, 4, 6, 11])
def test_no_polynomial_exceeds_what_is_called_its_highest(dim):
    """The branch and bound's value is above a dense grid's, and by no more than rounding."""
    program = delsarte._Program(dim, 30)
    for cosine in (0.1, 0.5, 0.7):
        coefficients, _ = program.solve(cosine)
        rough = coefficients + np.random.default_rng(dim).uniform(0, 1, 30)  # goes far above 0
        for each in (coefficients, rough):
            grid = program.f(each, np.linspace(math.acos(cosine), math.pi, 200_001))
            highest = program.highest(each, cosine)
            assert grid.max() <= highest
            assert highest < grid.max() + 1e-6 * (1 + each.sum())


def test_the_derivative_of_the_size_is_the_programs():
    program = delsarte._Program(5, 20)
    coefficients, slope = program.solve(0.4)
    more, _ = program.solve(0.4 + 1e-5)
    assert slope == pytest.approx((more.sum() - coefficients.sum()) / 1e-5, rel=1e-3)


def test_the_program_proves_the_600_cell_optimal():
    golden = codes.SMALL["600-cell"].worst
    assert golden - 1e-6 < bounds.delsarte(120, 4) <= golden
    assert bounds.levenshtein(120, 4) < golden - 1e-3


@pytest.mark.parametrize(
    ("count", "dim", "more"), [(24, 4, 0.0035), (40, 5, 0.0048), (72, 6, 0.0066), (126, 7, 0.0021)]
)
def test_the_program_improves_on_levenshtein(count, dim, more):
    found, before = bounds.delsarte(count, dim), bounds.levenshtein(count, dim)
    assert before + more < found < 0.5
    assert delsarte.size(found, dim) <= count
    assert delsarte.size(found + 1e-6, dim) > count  # it is the program's own, not a weaker one


@pytest.mark.parametrize(("count", "dim"), [(240, 8), (300, 5), (10_000, 512), (288, 16)])
def test_test_functions_vanish_up_to_the_bounds_degree(count, dim):
    degree = bounds._levenshtein_degree(count, dim)
    nodes, weights = bounds._quadrature(count, dim)
    assert weights[-1] * count == pytest.approx(1)
    assert nodes == pytest.approx(nodes.clip(-1, 1))
    assert bounds.levenshtein(count, dim) == pytest.approx(np.sort(nodes)[-2], abs=1e-12)
    q = np.array(bounds.test_functions(count, dim, degree + 1))
    assert np.abs(q[:degree]).max() * count < 1e-9
    assert abs(q[degree]) * count > 1e-3


@pytest.mark.parametrize(("count", "dim"), [(24, 4), (40, 5), (8, 3), (60, 8), (1000, 24)])
def test_test_functions_say_whether_the_program_improves(count, dim):
    negative = min(bounds.test_functions(count, dim, delsarte.DEGREE)) < -1e-9 / count
    low = bounds.levenshtein(count, dim)
    assert (delsarte.improve(count, dim, low) > low + 1e-8) == negative
    assert (bounds.delsarte(count, dim) > low) == negative


@pytest.mark.parametrize("dim", [3, 4, 5])
@pytest.mark.slow
def test_the_programs_bound_rises_with_the_number_of_points(dim):
    counts = [*range(2 * dim, 2 * dim + 6), 24, 25, 60, 61, 150, 300]
    found = [bounds.delsarte(count, dim) for count in counts]
    assert all(a < b < 1 for a, b in itertools.pairwise(found))


def test_a_solver_that_fails_only_weakens_the_bound(monkeypatch):
    monkeypatch.setattr(delsarte._Program, "solve", lambda self, cosine: None)
    assert delsarte.improve(24, 4, 0.4) == 0.4
    assert delsarte.size(0.5, 4) == math.inf


@pytest.mark.parametrize(
    ("cosine", "dim", "degree", "message"),
    [
        (1.0, 3, 30, r"cosine must be in \(-1, 1\), got 1.0"),
        (0.5, 1, 30, "dim must be at least 2, got 1"),
        (0.5, 3, 1, "degree must be at least 2, got 1"),
        (math.nan, 3, 30, r"cosine must be in \[-1, 1\], got nan"),
    ],
)
def test_bad_arguments_of_the_size(cosine, dim, degree, message):
    with pytest.raises(ValueError, match=message):
        delsarte.size(cosine, dim, degree)


# -- all bounds at once


@pytest.mark.parametrize(
    ("count", "dim", "names"),
    [
        (7, 2, ["regular polygon", "Rankin"]),
        (16, 8, ["Rankin", "Levenshtein"]),
        (13, 3, ["Delsarte's linear program", "Fejes Tóth", "Levenshtein", "Rankin"]),
        (24, 4, ["Delsarte's linear program", "Levenshtein", "Rankin"]),
        (240, 8, ["Levenshtein", "Rankin"]),
        (10_000, 512, ["Levenshtein", "Rankin"]),
    ],
)
def test_the_certificate_names_every_bound(count, dim, names):
    found = bounds.certificate(count, dim)
    assert sorted(bound.name for bound in found) == sorted(names)
    assert found[0].name == names[0]
    cosines = [bound.cosine for bound in found]
    assert cosines == sorted(cosines, reverse=True)
    assert all(type(cosine) is float for cosine in cosines)
    assert bounds.best(count, dim) in found
    assert found[0].cosine >= bounds.best(count, dim).cosine


def test_antipodal_points_have_welchs_bound_too():
    found = {bound.name: bound.cosine for bound in bounds.certificate(240, 8, antipodal=True)}
    assert found["Welch, of lines"] == bounds.welch(120, 8) <= 0.5
    assert bounds.certificate(2, 3, antipodal=True)[0] == (-1, "Rankin")
    kerdock = bounds.certificate(4224, 64, antipodal=True)[0]
    assert kerdock.name == "Welch, of lines"
    assert kerdock.cosine == pytest.approx(1 / 8, rel=0.01)
    assert kerdock.cosine <= 1 / 8
    with pytest.raises(ValueError, match="count must be even for antipodal points, got 7"):
        bounds.certificate(7, 3, antipodal=True)


@pytest.mark.parametrize("dim", [3, 4, 512])
def test_bounds_of_very_many_points_are_lower_ones_of_fewer(dim):
    found = [bounds.levenshtein(count, dim) for count in (10**7, 10**9, 10**12, 2**63 - 1)]
    assert found == sorted(found)
    assert found[-1] < 1
    assert bounds.certificate(10**12, dim)[0].cosine <= bounds.random_worst(10**12, dim)
    assert 0 < bounds.welch(10**12, dim) < 1
    assert PackConfig(10**12, dim).count == 10**12
    size = bounds._design_size(dim, bounds.MOST_DEGREE + 1)
    if size < 2**62:
        last, more = bounds.levenshtein(size - 1, dim), bounds.levenshtein(2 * size, dim)
        assert last == pytest.approx(more, abs=1e-12)


@pytest.mark.parametrize(
    "name", ["best", "certificate", "delsarte", "rankin", "welch", "levenshtein", "random_worst"]
)
def test_bad_arguments(name):
    function = getattr(bounds, name)
    with pytest.raises(ValueError, match="count must be at least 2, got 1"):
        function(1, 3)
    with pytest.raises(ValueError, match="dim must be at least 2, got 1"):
        function(5, 1)
    with pytest.raises(ValueError, match=r"count must be less than 2\^63, got 10{30}"):
        function(10**30, 3)
    with pytest.raises(TypeError, match="count must be an int, got float"):
        function(5.0, 3)
