"""The scores of all pairs of images: their distributions, and the hardest pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.check import check_least, describe
from .embedding import doubled

if TYPE_CHECKING:
    from ..data.formats.images import Store


class ScoredPair(NamedTuple):
    """A pair of images, first < second, and the cosine of their embeddings."""

    score: float
    first: int
    second: int


@dataclass(frozen=True, eq=False)
class ScoreDensities:
    """Densities of the scores of genuine and impostor pairs.

    Attributes:
        edges: (B + 1,) float64: the edges of the bins, from -1 to 1.
        genuine, impostor: (B,) float64: densities, of area 1; 0 if there is no such pair.
    """

    edges: np.ndarray
    genuine: np.ndarray
    impostor: np.ndarray


@dataclass(frozen=True, eq=False)
class PairScores:
    """The scores of a set's pairs of images, by kind, and the pairs to look at.

    Attributes:
        densities: of all scores.
        genuine: the hardest genuine pairs, by rising score.
        impostor: the hardest impostor pairs, by falling score.
        images: the store of the images, which the pairs index; None where these are templates.
    """

    densities: ScoreDensities
    genuine: list[ScoredPair]
    impostor: list[ScoredPair]
    images: Store | None

    def to_json(self) -> dict[str, Any]:
        """Return densities and pairs, ready for `json.dumps`, with the images' names."""

        def named(pair: ScoredPair) -> dict[str, Any]:
            rows = [pair.first, pair.second]
            if self.images is None:
                return {"score": pair.score, "templates": rows}
            return {"score": pair.score, "images": [self.images.name(row) for row in rows]}

        return {
            "densities": {name: each.tolist() for name, each in vars(self.densities).items()},
            "hardest_genuine": [named(pair) for pair in self.genuine],
            "hardest_impostor": [named(pair) for pair in self.impostor],
        }


def scores_of_all(embeddings: Tensor, labels: Tensor, images: Store, count: int = 6) -> PairScores:
    """Return the scores of all pairs of labeled images; see `score_densities`, `hardest_pairs`."""
    genuine, impostor = hardest_pairs(embeddings, labels, count)
    return PairScores(score_densities(embeddings, labels), genuine, impostor, images)


def scores_of_pairs(
    cosine: Tensor,
    same: Tensor,
    first: Tensor,
    second: Tensor,
    images: Store | None = None,
    count: int = 6,
    bins: int = 100,
) -> PairScores:
    """Return the scores of given pairs.

    Args:
        cosine: (P,) floating, finite, in [-1, 1] but for rounding. same: (P,) bool. first, second:
            (P,) integer.
        images: see `PairScores`. count: number of hardest pairs of each kind. bins: of densities.

    Raises:
        ValueError: for wrong shapes or dtypes, non-finite cosines, and numbers below 1.
    """
    check_least("count", count, 1)
    check_least("bins", bins, 1)
    check_scored(cosine, same)
    scores, kinds = cosine.detach().cpu().double().clamp(-1, 1), same.cpu()
    edges = np.linspace(-1.0, 1.0, bins + 1)

    def of(kind: bool) -> tuple[np.ndarray, list[ScoredPair]]:
        rows = (kinds == kind).nonzero()[:, 0]
        density = np.histogram(scores[rows].numpy(), edges)[0] / (max(1, len(rows)) * (2.0 / bins))
        rows = rows[scores[rows].argsort(descending=not kind, stable=True)[:count]]
        return density, [ScoredPair(float(scores[i]), int(first[i]), int(second[i])) for i in rows]

    (genuine, lowest), (impostor, highest) = of(True), of(False)
    return PairScores(ScoreDensities(edges, genuine, impostor), lowest, highest, images)


def score_densities(
    embeddings: Tensor, labels: Tensor, bins: int = 100, block: int = 1024
) -> ScoreDensities:
    """Return the densities of the cosines of all genuine and all impostor pairs.

    Args:
        embeddings: (N, D) floating, finite, of any length; a zero row has cosine 0.
        labels: (N,) integer, on any device.
        bins: number of bins, at least 1. block: rows compared at once.

    Raises:
        ValueError: for wrong shapes or dtypes, non-finite embeddings, and numbers below 1.

    Memory: 16·block·N bytes.
    """
    check_least("bins", bins, 1)
    edges = np.linspace(-1.0, 1.0, bins + 1)
    counts = np.zeros((2, bins))
    for cosine, same, upper, _ in _blocks(embeddings, labels, block):
        for kind, found in enumerate((upper & same, upper & ~same)):
            counts[kind] += np.histogram(cosine[found].cpu().numpy(), edges)[0]
    areas = counts.sum(1, keepdims=True).clip(1) * (2.0 / bins)
    genuine, impostor = counts / areas
    return ScoreDensities(edges, genuine, impostor)


def hardest_pairs(
    embeddings: Tensor, labels: Tensor, count: int = 5, block: int = 1024
) -> tuple[list[ScoredPair], list[ScoredPair]]:
    """Return the genuine pairs of lowest and the impostor pairs of highest cosine.

    Args:
        embeddings, labels, block: as in `score_densities`.
        count: number of pairs of each kind, at least 1; fewer are returned if there are fewer.

    Returns:
        Genuine pairs by rising score and impostor pairs by falling score; of equal scores, the
        pair of the lower indices comes first.

    Raises:
        ValueError: as `score_densities`.

    Memory: 16·block·N bytes.
    """
    check_least("count", count, 1)
    hardest: list[list[ScoredPair]] = [[], []]
    for cosine, same, upper, start in _blocks(embeddings, labels, block):
        for kind, found in enumerate((upper & same, upper & ~same)):
            scores, (first, second) = cosine[found], found.nonzero(as_tuple=True)
            order = scores.argsort(descending=kind == 1, stable=True)[:count]
            rows = zip(
                scores[order].tolist(),
                (first[order] + start).tolist(),
                second[order].tolist(),
                strict=True,
            )
            hardest[kind] += [ScoredPair(*row) for row in rows]
            sign = -1 if kind == 1 else 1
            hardest[kind].sort(key=lambda pair: sign * pair.score)
            del hardest[kind][count:]
    genuine, impostor = hardest
    return genuine, impostor


def check_labeled(embeddings: Tensor, labels: Tensor, nonzero: bool = False) -> None:
    """Raise ValueError unless there are (N, D) finite embeddings and N integer labels.

    With ``nonzero``, a row of zeros raises too.
    """
    if embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise ValueError(
            f"embeddings must be floating point of shape (N, D), got {describe(embeddings)}"
        )
    integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if labels.shape != embeddings.shape[:1] or not integer:
        raise ValueError(
            f"labels must be integer of shape ({len(embeddings)},), got {describe(labels)}"
        )
    check_rows_finite("embeddings", embeddings, nonzero)


def check_rows_finite(name: str, rows: Tensor, nonzero: bool = False) -> None:
    """Raise ValueError unless rows (N, D) are finite and, with ``nonzero``, none is zero."""
    if bad := int((~rows.isfinite()).any(1).sum()):
        raise ValueError(f"{name} must be finite, got {bad} of {len(rows)} rows with nan or inf")
    if nonzero and (zero := int((rows == 0).all(1).sum())):
        raise ValueError(f"{name} must have non-zero rows, got {zero} of {len(rows)} rows of zeros")


def check_scored(cosine: Tensor, same: Tensor) -> None:
    """Raise ValueError unless there are P finite scores and as many bool kinds."""
    if cosine.ndim != 1 or not cosine.is_floating_point() or not cosine.isfinite().all():
        raise ValueError(
            f"cosine must be finite, floating point of shape (P,), got {describe(cosine)}"
        )
    if same.shape != cosine.shape or same.dtype != torch.bool:
        raise ValueError(f"same must be bool of shape ({len(cosine)},), got {describe(same)}")


def _blocks(
    embeddings: Tensor, labels: Tensor, block: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """Yield cosines, equal labels, and second > first, each (rows, N), and the first row's index.

    The cosines are float64 in [-1, 1].
    """
    check_least("block", block, 1)
    check_labeled(embeddings, labels)
    unit = F.normalize(doubled(embeddings.detach()))
    labels, index = labels.to(unit.device), torch.arange(len(unit), device=unit.device)
    for rows in index.split(block):
        cosine = (unit[rows] @ unit.T).clamp_(-1.0, 1.0)
        same = labels[rows, None] == labels
        yield cosine, same, index > rows[:, None], int(rows[0])
