"""Greedy farthest-point selection, on points whose selection is known."""

import math

import pytest
import torch
from synface.common.rng import generator, normals
from synface.synthesis.packing import farthest_points


def on_circle(*degrees):
    """Return unit vectors in the plane, by their angles."""
    angles = torch.tensor(degrees, dtype=torch.float64) * (math.pi / 180)
    return torch.stack([angles.cos(), angles.sin()], 1)


def test_the_farthest_from_those_chosen_comes_next():
    points = on_circle(0, 10, 170, 80, 181, 262)
    assert farthest_points(points, 4).tolist() == [0, 4, 5, 3]
    assert farthest_points(points, 6).tolist() == [0, 4, 5, 3, 2, 1]
    assert farthest_points(points, 2, first=3).tolist() == [3, 5]
    assert farthest_points(points, 1, first=3).tolist() == [3]


def test_equal_points_are_each_chosen_once():
    points = on_circle(0, 0, 90, 90)
    assert farthest_points(points, 4).tolist() == [0, 2, 1, 3]
    assert farthest_points(points[:2], 2).tolist() == [0, 1]


def test_lengths_count():
    rows = torch.tensor([[1.0, 0.0], [9.0, 0.0], [0.0, 0.0], [-1.0, 0.0], [0.0, 4.0]])
    assert farthest_points(rows, 3).tolist() == [0, 1, 4]


def test_the_smallest_distance_is_at_least_half_of_a_simplex_s():
    simplex = torch.eye(5, dtype=torch.float32) - 0.2
    simplex *= math.sqrt(1 / 0.8)
    others = normals((300, 5), generator(0, "points", 0))
    others -= others.mean(1, keepdim=True)  # in the simplex's hyperplane
    others /= others.norm(dim=1, keepdim=True)
    rows = torch.cat([others, simplex])

    def smallest(points):
        return torch.pdist(points).min().item()

    chosen = smallest(rows[farthest_points(rows, 5)])
    assert smallest(simplex) / 2 <= chosen <= smallest(simplex) + 1e-6
    assert chosen > 1.5 * smallest(others[:5])


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (torch.ones(3), {}, r"rows must be floating point of shape \(M, D\), got float32 \(3,\)"),
        (torch.ones(3, 2, dtype=torch.int64), {}, "floating point .*, got int64"),
        (torch.tensor([[1.0, 0.0], [math.nan, 0.0]]), {}, "rows must be finite, row 1 is not"),
        (torch.eye(3), {"count": 4}, "count must be at most the 3 rows, got 4"),
        (torch.eye(3), {"count": 0}, "count must be at least 1, got 0"),
        (torch.eye(3), {"first": 3}, "first must be less than the 3 rows, got 3"),
        (torch.eye(3), {"first": -1}, "first must be at least 0, got -1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_are_named(rows, options, message):
    with pytest.raises(ValueError, match=message):
        farthest_points(rows, **{"count": 2, **options})


def test_rows_that_are_no_tensor():
    with pytest.raises(TypeError, match="rows must be a tensor, got list"):
        farthest_points([[1.0, 0.0]], 1)
