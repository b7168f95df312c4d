"""Distributions of mixing shares against their definitions."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from scipy import stats
from synface.data.mixing import (
    Beta,
    Constant,
    Grid,
)

from tests.helpers.mixing import seeded


@pytest.mark.parametrize("steps", [2, 5, 21])
def test_grid_is_uniform_over_exactly_its_values(steps):
    drawn = Grid(steps).sample(2000 * steps, seeded())
    assert drawn.dtype == torch.float64
    counts = Counter(drawn.tolist())
    assert sorted(counts) == [k / (steps - 1) for k in range(steps)]
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_the_default_grid_is_that_of_synface():
    values = Grid().sample(4000, seeded()).unique()
    assert values.tolist() == [k / 20 for k in range(21)]


@pytest.mark.parametrize("parameters", [(1.0,), (0.2,), (0.01, 5.0), (2.0, 5.0), (0.5, 8.0)])
def test_beta_follows_its_distribution(parameters):
    drawn = Beta(*parameters).sample(20_000, seeded(1))
    assert drawn.dtype == torch.float64
    a, b = parameters[0], parameters[-1]
    assert stats.kstest(drawn.numpy(), stats.beta(a, b).cdf).pvalue > 1e-3


@pytest.mark.parametrize(("a", "values"), [(1e-300, {0.0, 1.0}), (1e300, {0.5})])
def test_extreme_betas_are_their_limits(a, values):
    drawn = Beta(a).sample(4000, seeded())
    assert set(drawn.tolist()) == values
    assert abs(drawn.mean().item() - 0.5) < 0.05


@pytest.mark.parametrize("ratio", [Grid(), Beta(0.3), Constant(0.25)])
def test_any_count_can_be_drawn_and_drawn_again(ratio):
    for count in (0, 1, 5):
        drawn = ratio.sample(count, seeded(3))
        assert drawn.shape == (count,)
        assert torch.equal(drawn, ratio.sample(count, seeded(3)))
    assert torch.equal(Constant(0.25).sample(3), torch.full((3,), 0.25, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Grid(1), ValueError, "steps must be at least 2, got 1"),
        (lambda: Grid(2.5), TypeError, "steps must be an integer ≥ 2, got float"),
        (lambda: Beta(0), ValueError, r"a must be in \[1e-300, 1e\+300\], got 0"),
        (lambda: Beta(1, float("nan")), ValueError, "b must be in .*, got nan"),
        (lambda: Beta("1"), TypeError, "a must be a number"),
        (lambda: Constant(1.5), ValueError, r"value must be in \[0, 1\], got 1.5"),
        (lambda: Constant(None), TypeError, "value must be a number .* got NoneType"),
        (lambda: Grid().sample(-1), ValueError, "count must be at least 0, got -1"),
    ],
)
def test_distribution_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
