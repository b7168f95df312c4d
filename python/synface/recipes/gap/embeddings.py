"""Measures of people's embeddings: their spread, the distances between them, and a map of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.extras import extra
from ..report import spread


def within(embeddings: Tensor) -> dict[str, Any]:
    """Return the `spread` over identities of their images' mean cosine distance to their center.

    Args:
        embeddings: (N, K, D) unit rows, K of each identity. Its center is their normalized mean.
    """
    embeddings = embeddings.double()
    cosines = (embeddings * _centers(embeddings)[:, None]).sum(-1)
    return spread((1 - cosines).mean(1).tolist())


def between(embeddings: Tensor) -> dict[str, Any]:
    """Return the mean cosine distance of two identities' centers, as `spread` does.

    "values" are the jackknife's pseudo-values, one for each identity, since pairs that share an
    identity are not independent.

    Args:
        embeddings: (N, K, D) unit rows, N at least 3.
    """
    centers = _centers(embeddings.double())
    count = len(centers)
    distances = (1 - centers @ centers.T).fill_diagonal_(0.0)
    own = distances.sum(1)
    mean = distances.sum() / (count * (count - 1))
    without = (distances.sum() - 2 * own) / ((count - 1) * (count - 2))
    return spread((count * mean - (count - 1) * without).tolist())


def across(embeddings: Tensor, others: Tensor) -> dict[str, Any]:
    """Return the `spread` over identities of their centers' mean distance to those of others.

    Args:
        embeddings, others: (N, K, D) and (M, L, D) unit rows.
    """
    centers = _centers(embeddings.double()) @ _centers(others.double()).T
    return spread((1 - centers).mean(1).tolist())


def unpaired(of: dict[str, Any], less: dict[str, Any]) -> dict[str, Any]:
    """Return the difference of two spreads' means, its 95 % interval and p, by Welch's t-test."""
    with extra("train", "statistics of embeddings"):
        from scipy.stats import ttest_ind

    found = ttest_ind(of["values"], less["values"], equal_var=False)
    low, high = found.confidence_interval(0.95)
    return {
        "mean": of["mean"] - less["mean"],
        "ci95": float(high - low) / 2,
        "p": float(found.pvalue),
    }


def scaled(rows: Tensor) -> tuple[np.ndarray, float]:
    """Return points (N, 2) whose distances approach the cosine distances of rows, and their share.

    This is classical multidimensional scaling; the share is that of the first two eigenvalues in
    the sum of all positive ones.

    Args:
        rows: (N, D) unit rows, N at least 3.
    """
    rows = rows.double().cpu()
    squared = (1 - rows @ rows.T).numpy() ** 2
    squared = squared - squared.mean(0)
    gram = -0.5 * (squared - squared.mean(1, keepdims=True))
    values, vectors = np.linalg.eigh(gram)  # in increasing order
    first = values[:-3:-1].clip(0)
    axes = vectors[:, :-3:-1]
    largest = axes[np.abs(axes).argmax(0), [0, 1]]  # eigenvectors have no sign of their own
    return axes * np.sign(largest) * np.sqrt(first), float(first.sum() / values.clip(0).sum())


def _centers(embeddings: Tensor) -> Tensor:
    return F.normalize(torch.mean(embeddings, 1))
