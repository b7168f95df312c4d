"""Face verification by the cosine of embeddings, and identification in a gallery."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import synface_kernels as sk

from ..common.check import check_least, describe
from .embedding import doubled
from .scores import check_labeled, check_rows_finite, check_scored


@dataclass(frozen=True, eq=False)
class Verification:
    """Accuracy, ROC and TAR@FAR of scores of genuine (same person) and impostor pairs.

    Attributes:
        accuracy: mean over the folds, by `verify` on as many genuine as impostor pairs (chance is
            0.5). Accuracy, deviation and threshold are None for pairs without folds.
        accuracy_std: standard deviation over the folds (divided by their number).
        threshold: mean over the folds of the least cosine that is accepted as the same person.
        auc: area under the ROC curve over all pairs, ties counted half.
        tar: for each requested false accept rate the highest true accept rate at a FAR not above
            it; None if there are too few impostor pairs to measure such a FAR.
        fpr, tpr: the ROC curve over all pairs, float64, from (0, 0) to (1, 1), corners only.
        pairs, genuine, impostor: numbers of pairs.
    """

    accuracy: float | None
    accuracy_std: float | None
    threshold: float | None
    auc: float
    tar: dict[float, float | None]
    fpr: np.ndarray = field(repr=False)
    tpr: np.ndarray = field(repr=False)
    pairs: int
    genuine: int
    impostor: int

    def summary(self) -> str:
        """Return the results as aligned lines of text."""
        pairs = f"{self.pairs:,} ({self.genuine:,} genuine, {self.impostor:,} impostor)"
        rows = [("pairs", pairs), ("ROC-AUC", f"{self.auc:.4f}")]
        if self.accuracy is not None:
            found = (
                f"{self.accuracy:.4f} ± {self.accuracy_std:.4f} (threshold {self.threshold:.4f})"
            )
            rows.insert(1, ("accuracy", found))
        for far, tar in self.tar.items():
            needed = f"not measured: needs at least {_pairs_for(far):,} impostor pairs"
            rows.append((f"TAR at FAR {far:g}", needed if tar is None else f"{tar:.4f}"))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def to_json(self) -> dict[str, Any]:
        """Return all but the curve, ready for `json.dumps`."""
        values = {name: value for name, value in vars(self).items() if name not in ("fpr", "tpr")}
        return values | {"tar": {f"{far:g}": tar for far, tar in self.tar.items()}}


def verify(
    embeddings: Tensor,
    labels: Tensor,
    folds: int = 10,
    fars: Sequence[float] = (1e-1, 1e-2, 1e-3),
    seed: int = 0,
) -> Verification:
    """Verify all pairs of images by the cosine of their embeddings.

    ROC-AUC and TAR are over all pairs. Accuracy is over as many genuine as impostor pairs: the more
    numerous kind is subsampled at random, and both kinds are spread evenly over the folds. Each
    fold uses the threshold that is best on the other folds.

    Args:
        embeddings: (N, D) floating, of any length (the cosine normalizes; a zero row has cosine 0).
            The cosines are computed there if they are on a GPU, the rest on the CPU.
        labels: (N,) integer, on any device.
        folds: number of folds, at least 2.
        fars: false accept rates in (0, 1].
        seed: random seed of the subset and the folds.

    Raises:
        ValueError: for wrong shapes or dtypes, non-finite embeddings, a kind of pair with fewer
            members than folds, or folds or fars out of range.

    Memory: about 8*N*N bytes for the cosines (float64), on the embeddings' device, and 8*N*N more
    to sort them.
    """
    check_labeled(embeddings, labels)
    check_least("folds", folds, 2)
    n, embeddings = len(embeddings), doubled(embeddings.detach())
    labels = labels.to(embeddings.device)
    unit = F.normalize(embeddings)
    cosines = unit @ unit.T
    upper = torch.ones(n, n, dtype=torch.bool, device=embeddings.device).triu_(1)
    same = labels[:, None] == labels
    genuine = cosines[upper & same].cpu().numpy()
    impostor = cosines[upper & ~same].cpu().numpy()
    for name, scores in (("genuine", genuine), ("impostor", impostor)):
        if len(scores) < folds:
            raise ValueError(
                f"{folds} folds need at least {folds} genuine and {folds} impostor pairs, got "
                f"{len(scores)} {name} ones from {n} images of {len(labels.unique())} identities"
            )

    return _verification(genuine, impostor, fars, *_fold_accuracies(genuine, impostor, folds, seed))


def verify_pairs(
    cosine: Tensor,
    same: Tensor,
    fold: Tensor | None = None,
    fars: Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6),
) -> Verification:
    """Verify given pairs, in given folds.

    The accuracy of a fold is that of its pairs at the threshold that is best on all other folds.

    Args:
        cosine: (P,) floating, finite: the pairs' scores. same: (P,) bool: of the same person.
        fold: (P,) integer, at least two different; None measures no accuracy.
        fars: false accept rates in (0, 1].

    Raises:
        ValueError: for wrong shapes or dtypes, non-finite cosines, pairs of one kind alone, fewer
            than two folds, or fars out of range.

    Memory: about 100 bytes per pair.
    """
    check_scored(cosine, same)
    count = len(cosine)
    scores, kinds = cosine.detach().cpu().double().numpy(), same.cpu().numpy()
    if not 0 < int(kinds.sum()) < count:
        raise ValueError(
            f"pairs must be of both kinds, got {int(kinds.sum())} genuine ones of {count}"
        )
    if fold is None:
        return _verification(scores[kinds], scores[~kinds], fars)
    if fold.shape != (count,) or fold.is_floating_point():
        raise ValueError(f"fold must be integer of shape ({count},), got {describe(fold)}")
    folds = fold.cpu().numpy()
    accuracies, thresholds = [], []
    if len(numbers := np.unique(folds)) < 2:
        raise ValueError(f"fold must have two different values or more, got {len(numbers)}")
    for number in numbers:
        here = folds == number
        rest, kind = scores[~here], kinds[~here]
        thresholds.append(_best_threshold(rest[kind], rest[~kind]))
        accuracies.append(float(((scores[here] >= thresholds[-1]) == kinds[here]).mean()))
    return _verification(
        scores[kinds], scores[~kinds], fars, np.array(accuracies), float(np.mean(thresholds))
    )


@dataclass(frozen=True)
class Identification:
    """Rank-1 rate of probes in a gallery.

    Attributes:
        rank1: share of probes whose nearest gallery entry shows the same person.
        probes, gallery: numbers of entries.
    """

    rank1: float
    probes: int
    gallery: int


def identify(
    probe: Tensor, probe_people: Tensor, gallery: Tensor, gallery_people: Tensor
) -> Identification:
    """Identify probes in a gallery at rank 1, closed set: each probe's person is in the gallery.

    Args:
        probe: (Q, D) and gallery: (G, D) floating, of any length, on one device.
        probe_people: (Q,) and gallery_people: (G,) integer.

    Raises:
        ValueError: for mismatched shapes, rows that are zero or not finite, and a probe of a person
            who is not in the gallery.

    Memory: that of `synface_kernels.nearest_neighbors`, never Q×G.
    """
    for name, rows, people in (
        ("probe", probe, probe_people),
        ("gallery", gallery, gallery_people),
    ):
        if rows.ndim != 2 or not len(rows) or people.shape != rows.shape[:1]:
            raise ValueError(
                f"{name} must be (N, D) with N at least 1 and its people (N,), "
                f"got {tuple(rows.shape)} and {tuple(people.shape)}"
            )
        check_rows_finite(name, rows, nonzero=True)
    if not torch.isin(probe_people, gallery_people).all():
        raise ValueError("probe must only hold people of the gallery")
    nearest = sk.nearest_neighbors(probe, gallery, k=1)[1][:, 0].to(gallery_people.device)
    hits = gallery_people[nearest] == probe_people
    return Identification(float(hits.double().mean()), len(probe), len(gallery))


def _verification(
    genuine: np.ndarray,
    impostor: np.ndarray,
    fars: Sequence[float],
    accuracies: np.ndarray | None = None,
    threshold: float | None = None,
) -> Verification:
    if not all(0.0 < far <= 1.0 for far in fars):
        raise ValueError(f"fars must lie in (0, 1], got {tuple(fars)}")
    accepted = _roc(genuine, impostor)
    tpr, fpr = accepted[0] / len(genuine), accepted[1] / len(impostor)
    tar = {far: float(tpr[fpr <= far].max()) if 1 / len(impostor) <= far else None for far in fars}
    # Trapezoids in integers: exact, and half of a tied pair counts.
    doubled = int((np.diff(accepted[1]) * (accepted[0, 1:] + accepted[0, :-1])).sum())
    corner = np.r_[True, np.diff(accepted, n=2).any(0), True]
    return Verification(
        accuracy=None if accuracies is None else float(accuracies.mean()),
        accuracy_std=None if accuracies is None else float(accuracies.std()),
        threshold=threshold,
        auc=doubled / (2 * len(genuine) * len(impostor)),
        tar=tar,
        fpr=fpr[corner],
        tpr=tpr[corner],
        pairs=len(genuine) + len(impostor),
        genuine=len(genuine),
        impostor=len(impostor),
    )


def _roc(genuine: np.ndarray, impostor: np.ndarray) -> np.ndarray:
    """Return counts of accepted genuine and impostor pairs, int64 (2, T+1), by threshold.

    The first column accepts no pair; the others are for each distinct score, in falling order.
    """
    scores = np.concatenate([genuine, impostor])
    order = np.argsort(-scores, kind="stable")
    is_genuine = order < len(genuine)
    last_of_its_score = np.r_[np.diff(scores[order]) != 0, True]
    counts = np.stack([np.cumsum(is_genuine), np.cumsum(~is_genuine)])[:, last_of_its_score]
    return np.pad(counts, ((0, 0), (1, 0)))


def _fold_accuracies(
    genuine: np.ndarray, impostor: np.ndarray, folds: int, seed: int
) -> tuple[np.ndarray, float]:
    """Return each fold's accuracy at the threshold of the others, and the mean threshold."""
    rng = np.random.default_rng(seed)
    count = min(len(genuine), len(impostor))
    scores = np.stack([rng.permutation(kind)[:count] for kind in (genuine, impostor)])
    fold = np.arange(count) % folds
    accuracies, thresholds = np.empty(folds), np.empty(folds)
    for i in range(folds):
        threshold = _best_threshold(*scores[:, fold != i])
        same, different = scores[:, fold == i] >= threshold
        accuracies[i] = (same.mean() + (~different).mean()) / 2
        thresholds[i] = threshold
    return accuracies, float(thresholds.mean())


def _best_threshold(genuine: np.ndarray, impostor: np.ndarray) -> float:
    """Return the threshold of fewest errors: midway in its gap, the highest of several."""
    accepted = _roc(genuine, impostor)
    best = int(np.argmax(accepted[0] - accepted[1]))
    above = np.unique(np.concatenate([genuine, impostor]))[::-1]
    if best == 0:  # accept nothing
        return float(np.nextafter(above[0], np.inf))
    if best == len(above):  # accept everything
        return float(above[-1])
    low, high = above[best], above[best - 1]
    middle = low + (high - low) / 2
    return float(middle if middle > low else high)


def _pairs_for(far: float) -> int:
    """Return the least number of impostor pairs that can measure a false accept rate `far`."""
    count = math.floor(1.0 / far)
    return count if 1 / count <= far else count + 1
