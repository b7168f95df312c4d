"""Verification against scikit-learn, on separable data, at chance level, and on real faces."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.metrics import auc, roc_auc_score, roc_curve
from synface.data import normalize, read_folder
from synface.evaluation.embedding import embed, pixel_embeddings
from synface.evaluation.metrics import (
    Verification,
    _best_threshold,
    _pairs_for,
    _roc,
    verify,
)
from torch import nn

ORL = Path(__file__).parents[2] / ".." / "shared" / "data" / "orl"


def people(count: int, each: int, spread: float, dim: int = 8, seed: int = 0):
    """Return embeddings around one random direction per person, and their labels."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(count).repeat_interleave(each)
    centers = torch.randn(count, dim, generator=g)
    return centers[labels] + spread * torch.randn(len(labels), dim, generator=g), labels


def pair_scores(embeddings: torch.Tensor, labels: torch.Tensor):
    """Return every pair's cosine and whether it is genuine, pair by pair."""
    unit = embeddings.double().numpy()
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    pairs = [(i, j) for i in range(len(unit)) for j in range(i + 1, len(unit))]
    scores = np.array([unit[i] @ unit[j] for i, j in pairs])
    return scores, np.array([bool(labels[i] == labels[j]) for i, j in pairs])


# -- verify


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_the_curve_and_its_area_are_scikit_learns(spread):
    embeddings, labels = people(12, 5, spread)
    got = verify(embeddings, labels)
    scores, genuine = pair_scores(embeddings, labels)
    assert got.pairs == len(scores) == got.genuine + got.impostor
    assert got.genuine == genuine.sum() == 12 * 10
    assert got.auc == pytest.approx(roc_auc_score(genuine, scores), abs=1e-12)
    fpr, tpr, _ = roc_curve(genuine, scores, drop_intermediate=False)
    assert {*zip(got.fpr, got.tpr, strict=True)} <= {*zip(fpr, tpr, strict=True)}
    assert auc(got.fpr, got.tpr) == pytest.approx(got.auc, abs=1e-12)
    assert (got.fpr[0], got.tpr[0], got.fpr[-1], got.tpr[-1]) == (0, 0, 1, 1)
    for far, tar in got.tar.items():
        assert tar == tpr[fpr <= far].max()


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=30),
    st.lists(st.integers(0, 5), min_size=1, max_size=30),
)
def test_counts_with_many_ties(genuine, impostor):
    accepted = _roc(np.array(genuine, float), np.array(impostor, float))
    area = auc(accepted[1], accepted[0])
    wins = sum((g > i) + 0.5 * (g == i) for g in genuine for i in impostor)
    assert area == pytest.approx(wins)
    truth = [1] * len(genuine) + [0] * len(impostor)
    assert area / len(genuine) / len(impostor) == pytest.approx(
        roc_auc_score(truth, genuine + impostor)
    )


@given(st.data())
def test_no_threshold_errs_less_than_the_best(data):
    score = st.floats(-1, 1) | st.sampled_from([0.0, 0.5, np.nextafter(0.5, 1), 1.0])
    genuine = np.array(data.draw(st.lists(score, min_size=1, max_size=12)))
    impostor = np.array(data.draw(st.lists(score, min_size=1, max_size=12)))

    def correct(threshold):
        return (genuine >= threshold).sum() + (impostor < threshold).sum()

    every = [-2.0, 2.0, *genuine, *impostor]
    accepted_less_refused = max((genuine >= t).sum() - (impostor >= t).sum() for t in every) + len(
        impostor
    )
    assert correct(_best_threshold(genuine, impostor)) == accepted_less_refused


def test_people_far_apart_are_told_apart():
    got = verify(*people(12, 5, 1e-3, dim=64))
    assert (got.accuracy, got.accuracy_std, got.auc) == (1.0, 0.0, 1.0)
    assert got.tar == {0.1: 1.0, 0.01: 1.0, 0.001: 1.0}
    assert 0.5 < got.threshold < 1.0  # between the impostors' cosines and 1
    assert got.fpr.tolist() == [0, 0, 1]
    assert got.tpr.tolist() == [0, 1, 1]


def test_labels_without_meaning_give_chance():
    g = torch.Generator().manual_seed(0)
    got = verify(torch.randn(300, 32, generator=g), torch.arange(30).repeat(10))
    assert got.genuine == 30 * 45
    sigma = math.sqrt(1 / 12 / got.genuine)  # of the AUC, next to so many impostors
    assert abs(got.auc - 0.5) < 4 * sigma
    assert abs(got.accuracy - 0.5) < 4 * 0.5 / math.sqrt(2 * got.genuine)


def test_embeddings_that_are_all_the_same_are_chance():
    got = verify(torch.ones(40, 4), torch.arange(8).repeat(5))
    assert got.auc == 0.5
    assert got.accuracy == 0.5
    assert got.tar[0.1] == 0.0
    assert got.fpr.tolist() == got.tpr.tolist() == [0, 1]


def test_lengths_order_and_label_names_do_not_matter():
    embeddings, labels = people(10, 4, 1.0)
    a = verify(embeddings, labels)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    b = verify(embeddings[order] * 4.0, 1000 - 7 * labels[order].int())
    assert a.auc == pytest.approx(b.auc, abs=1e-12)
    assert a.tar == pytest.approx(b.tar)
    assert (a.genuine, a.impostor) == (b.genuine, b.impostor)


def test_the_same_answer_twice_and_another_draw_with_another_seed():
    embeddings, labels = people(10, 4, 1.0)
    a, b, c = (verify(embeddings, labels, seed=seed) for seed in (0, 0, 1))
    assert a.to_json() == b.to_json()
    np.testing.assert_array_equal(a.tpr, b.tpr)
    assert a.threshold != c.threshold
    assert a.auc == c.auc


def test_more_genuine_than_impostor_pairs():
    embeddings, labels = people(2, 3, 1.0)
    labels = torch.tensor([0, 0, 0, 0, 0, 1])
    got = verify(embeddings, labels, folds=2)
    assert (got.genuine, got.impostor) == (10, 5)


def test_a_rate_too_fine_for_the_impostors_is_not_measured():
    got = verify(*people(5, 4, 1.0), fars=(1 / 160, 1 / 161, 1e-3, 1.0))
    assert got.impostor == 160
    assert got.tar[1 / 160] is not None
    assert got.tar[1 / 161] is None
    assert got.tar[1.0] == 1.0
    line = next(line for line in got.summary().splitlines() if "FAR 0.001 " in line)
    assert line.endswith("  not measured: needs at least 1,000 impostor pairs")


@given(st.integers(1, 10**6))
def test_the_impostors_needed_are_just_enough(count):
    assert _pairs_for(1 / count) == count


@given(st.floats(1e-7, 1.0))
def test_the_impostors_needed_reach_the_rate(far):
    count = _pairs_for(far)
    assert 1 / count <= far
    assume(count > 1)
    assert 1 / (count - 1) > far


def test_the_summary_is_aligned_and_the_json_complete():
    got = verify(*people(10, 4, 1.0))
    lines = got.summary().splitlines()
    assert lines[0].split() == ["pairs", "780", "(60", "genuine,", "720", "impostor)"]
    starts = {len(line) - len(line.split("  ", 1)[1].lstrip()) for line in lines}
    assert len(starts) == 1
    assert f"{got.auc:.4f}" in got.summary()
    read = json.loads(json.dumps(got.to_json(), allow_nan=False))
    fields = set(Verification.__dataclass_fields__) - {"fpr", "tpr"}
    assert set(read) == fields
    assert read["tar"] == {"0.1": got.tar[0.1], "0.01": got.tar[0.01], "0.001": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": torch.zeros(40)}, r"embeddings must be .*got float32 \(40,\)"),
        ({"embeddings": torch.zeros(40, 2, dtype=int)}, r"embeddings must be .*got int64"),
        ({"labels": torch.zeros(39, dtype=int)}, r"labels must be integer of shape \(40,\).*39"),
        ({"labels": torch.zeros(40)}, "labels must be integer.*float32"),
        ({"labels": torch.zeros(40, dtype=torch.bool)}, "labels must be integer.*bool"),
        ({"labels": torch.arange(40)}, "at least 10 genuine .*0 genuine ones.*40 identities"),
        ({"labels": torch.zeros(40, dtype=int)}, "0 impostor ones from 40 images of 1 ident"),
        ({"folds": 61}, "61 folds need at least 61 genuine .*got 60 genuine"),
        ({"folds": 1}, "folds must be at least 2, got 1"),
        ({"fars": (0.0,)}, r"fars must lie in \(0, 1\]"),
        ({"fars": (float("nan"),)}, r"fars must lie in \(0, 1\]"),
    ],
)
def test_verify_refuses(change, message):
    embeddings, labels = people(10, 4, 1.0)
    with pytest.raises(ValueError, match=message):
        verify(**{"embeddings": embeddings, "labels": labels, **change})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_verify_refuses_what_is_not_finite(value):
    embeddings, labels = people(10, 4, 1.0)
    embeddings[[3, 5], 1] = value
    with pytest.raises(ValueError, match="finite, got 2 of 40 rows"):
        verify(embeddings, labels)


# -- embed


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.BatchNorm2d(1)
        self.drop = nn.Dropout(0.5)
        self.linear = nn.Linear(6 * 5, 4)
        self.train()
        self.frozen.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.drop(self.frozen(x)).flatten(1))


def images(n: int = 7) -> torch.Tensor:
    g = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (n, 6, 5, 1), generator=g, dtype=torch.uint8)


def test_embed_is_the_normalized_sum_of_both_sides():
    net, x = Net(), images()
    got = embed(net, x, batch_size=3)
    plain = embed(net, x, flip=False)
    assert net.training
    assert net.drop.training
    assert not net.frozen.training  # it was not before either
    net.eval()
    with torch.no_grad():
        one, other = net(normalize(x)), net(normalize(x.flip(2)))
    torch.testing.assert_close(got, nn.functional.normalize(one + other))
    torch.testing.assert_close(plain, nn.functional.normalize(one))
    assert got.dtype == torch.float32
    assert not got.requires_grad
    assert torch.equal(got, embed(net, x, batch_size=3))
    torch.testing.assert_close(got, embed(net, x.flip(2)))


def test_a_model_that_fails_gets_its_mode_back():
    net = Net()
    with pytest.raises(RuntimeError):
        embed(net, torch.zeros(2, 9, 9, 1, dtype=torch.uint8))
    assert net.training
    assert not net.frozen.training


def test_embed_takes_models_without_parameters_and_of_low_precision():
    assert embed(nn.Flatten(), images()).shape == (7, 30)
    half = nn.Sequential(nn.Flatten(), nn.Linear(30, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert embed(half, images()).dtype == torch.float32


def test_embed_refuses():
    with pytest.raises(ValueError, match=r"uint8 .*got float32 \(7, 6, 5, 1\)"):
        embed(Net(), images().float())
    with pytest.raises(ValueError, match=r"N at least 1, got uint8 \(0, 6, 5, 1\)"):
        embed(Net(), images(0))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        embed(Net(), images(), batch_size=0)


# -- pixels


def test_pixel_embeddings_are_centered_unit_rows():
    x = images()
    own = pixel_embeddings(x)
    assert own.shape == (7, 30)
    assert own.dtype == torch.float32
    torch.testing.assert_close(own.norm(dim=1), torch.ones(7))
    torch.testing.assert_close(own.sum(1), torch.zeros(7), atol=1e-5, rtol=0)
    correlation = torch.from_numpy(np.corrcoef(x.flatten(1).numpy())).float()
    torch.testing.assert_close(own @ own.T, correlation)
    mean = x.double().mean(0)
    torch.testing.assert_close(
        pixel_embeddings(x, mean), nn.functional.normalize((x - mean).flatten(1)).float()
    )
    assert not pixel_embeddings(torch.full((1, 6, 5, 1), 9, dtype=torch.uint8)).any()
    with pytest.raises(ValueError, match=r"mean must have .*\(6, 5, 1\), got \(5, 6, 1\)"):
        pixel_embeddings(x, mean.transpose(0, 1))


def test_pixels_on_orl():
    """People s31 to s40 give the baseline to which a trained network is compared."""
    if not ORL.is_dir():
        pytest.skip("no ORL faces in ../shared/data/orl")
    _, unseen = read_folder(ORL).split(10)
    got = verify(pixel_embeddings(unseen.images), unseen.labels)
    assert (got.genuine, got.impostor) == (450, 4500)
    assert got.auc == pytest.approx(0.904, abs=0.003)
