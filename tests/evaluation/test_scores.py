"""Densities of scores, and the hardest pairs: by hand, by blocks, and against all pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from synface.evaluation import hardest_pairs, score_densities, scores_of_pairs


def test_the_hardest_pairs_by_hand():
    degrees = torch.tensor([0.0, 10.0, 90.0, 100.0, 130.0]).double().deg2rad()
    rows = 3 * torch.stack([degrees.cos(), degrees.sin()], 1)  # of any length
    labels = torch.tensor([0, 0, 0, 1, 1])
    genuine, impostor = hardest_pairs(rows, labels, 2)
    assert [(p.first, p.second) for p in genuine] == [(0, 2), (1, 2)]
    assert [(p.first, p.second) for p in impostor] == [(2, 3), (2, 4)]
    scores = [p.score for p in (*genuine, *impostor)]
    expected = [math.cos(math.radians(angle)) for angle in (90, 80, 10, 40)]
    assert scores == pytest.approx(expected)
    genuine, impostor = hardest_pairs(rows, labels, 100)
    assert (len(genuine), len(impostor)) == (4, 6)


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_blocks_change_nothing(block):
    rows = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.arange(50) % 6
    unit = torch.nn.functional.normalize(rows)
    first, second = torch.triu_indices(50, 50, 1)
    cosine, same = (unit[first] * unit[second]).sum(1), labels[first] == labels[second]
    pairs = hardest_pairs(rows, labels, 9, block=block)
    for found, kind, sign in zip(pairs, (same, ~same), (1, -1), strict=True):
        order = (sign * cosine[kind]).argsort()[:9]
        assert [(p.first, p.second) for p in found] == [
            (int(i), int(j)) for i, j in zip(first[kind][order], second[kind][order], strict=True)
        ]
    densities = score_densities(rows, labels, 20, block=block)
    for found, kind in ((densities.genuine, same), (densities.impostor, ~same)):
        expected = np.histogram(cosine[kind].numpy(), densities.edges, density=True)[0]
        np.testing.assert_allclose(found, expected)
        assert (found * np.diff(densities.edges)).sum() == pytest.approx(1)


def test_of_equal_scores_the_lower_indices_come_first():
    rows, labels = torch.ones(6, 3), torch.tensor([0, 1, 0, 1, 0, 1])
    for block in (1, 4, 6):
        genuine, impostor = hardest_pairs(rows, labels, 3, block=block)
        assert [(p.first, p.second) for p in genuine] == [(0, 2), (0, 4), (1, 3)]
        assert [(p.first, p.second) for p in impostor] == [(0, 1), (0, 3), (0, 5)]


def test_equal_embeddings_are_in_the_last_bin_and_missing_pairs_have_no_density():
    found = score_densities(torch.ones(3, 2), torch.zeros(3, dtype=torch.long), 10)
    assert found.genuine[-1] == pytest.approx(5)  # of width 0.2
    assert not found.impostor.any()


@pytest.mark.parametrize("function", [score_densities, hardest_pairs])
def test_refused(function):
    rows, labels = torch.randn(4, 2), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"embeddings must be floating point of shape \(N, D\)"):
        function(rows[0], labels)
    with pytest.raises(ValueError, match=r"labels must be integer of shape \(4,\), got"):
        function(rows, labels[:3])
    with pytest.raises(ValueError, match=r"labels must be integer .*got bool"):
        function(rows, labels.bool())
    for value in (math.nan, math.inf):
        broken = rows.clone()
        broken[2, 1] = value
        with pytest.raises(ValueError, match="embeddings must be finite, got 1 of 4 rows"):
            function(broken, labels)
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        function(rows, labels, block=0)
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        function(rows, labels, 0)


def test_scores_of_pairs_refuses():
    cosine, same, rows = torch.rand(4), torch.tensor([True, True, False, False]), torch.arange(4)
    scores_of_pairs(cosine, same, rows, rows)
    with pytest.raises(ValueError, match=r"cosine must be finite.* got float32 \(4,\)"):
        scores_of_pairs(cosine / 0, same, rows, rows)
    with pytest.raises(ValueError, match=r"same must be bool of shape \(4,\), got int64"):
        scores_of_pairs(cosine, rows, rows, rows)
    for name in ("count", "bins"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            scores_of_pairs(cosine, same, rows, rows, **{name: 0})
