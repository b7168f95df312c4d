"""Face verification: embeddings, and how well their cosines tell same people from different."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import synface_kernels as sk
from synface.common.check import describe
from synface.data import normalize
from synface.data.formats import decode
from synface.data.formats.images import Store


def embed(model: nn.Module, images: Tensor, batch_size: int = 256, flip: bool = True) -> Tensor:
    """Embeds images with the model in eval mode; each module's own mode is restored afterwards.

    Args:
        model: maps (B, C, H, W) float32 in [-1, 1] to floating embeddings (B, D), or to a tuple
            that begins with them, such as AdaFace's (embedding, norm).
        images: (N, H, W, C) uint8, N at least 1, on any device.
        batch_size: images per call of the model, which gets them on its first parameter's device.
        flip: add the embedding of the mirror image before normalizing.

    Returns:
        (N, D) float32 of unit rows, on the CPU.

    Raises:
        TypeError: where the model returns something else.
        ValueError: for images of another dtype or shape, no images, a batch size under 1, and
            embeddings that are not finite, naming the images by their index.
    """
    return _embed(model, images, batch_size, flip, lambda index: f"image {index}", 0)


@torch.no_grad()
def _embed(
    model: nn.Module,
    images: Tensor,
    batch_size: int,
    flip: bool,
    name: Callable[[int], str],
    first: int,
) -> Tensor:
    """Embed images as `embed` does; in errors image i is called name(first + i)."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    _check_images(images)
    parameter = next(model.parameters(), None)
    device = images.device if parameter is None else parameter.device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        rows = []
        for batch in images.split(batch_size):
            x = normalize(batch.to(device))
            y = _output(model(x), len(x))
            if flip:
                y = y + _output(model(x.flip(-1)), len(x))
            # On the CPU in float64, where the square of no float32 overflows.
            rows.append(F.normalize(y.cpu().double()).float())
    finally:
        for module, training in modes:
            module.training = training
    embeddings = torch.cat(rows)
    bad = (~embeddings.isfinite()).any(1).nonzero()[:, 0].tolist()
    if bad:
        shown = ", ".join(name(first + i) for i in bad[: decode.NAMED])
        shown += ", …" if len(bad) > decode.NAMED else ""
        raise ValueError(
            f"the network's embeddings of {len(bad)} of {len(embeddings)} images are not finite "
            f"(NaN or infinite): {shown}; check the network's weights and precision"
        )
    return embeddings


def _output(found: object, count: int) -> Tensor:
    """The embeddings in what a network returned for `count` images, float32."""
    parts = found if isinstance(found, (tuple, list)) else [found]
    rows = parts[0] if parts else None
    if not isinstance(rows, Tensor) or not rows.is_floating_point():
        came = ", ".join(describe(x) if isinstance(x, Tensor) else type(x).__name__ for x in parts)
        raise TypeError(
            "the network must return floating point embeddings (B, D), or a tuple that begins with "
            f"them, got {type(found).__name__}: {came or 'empty'}"
        )
    if rows.ndim != 2 or len(rows) != count or not rows.shape[1]:
        raise ValueError(
            f"the network must return embeddings of shape ({count}, D) for {count} images, "
            f"got {tuple(rows.shape)}"
        )
    return rows.float()


def embed_store(
    model: nn.Module,
    store: Store,
    image_shape: tuple[int, int, int],
    *,
    batch_size: int = 256,
    flip: bool = True,
    resize: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Embeds encoded images as `embed` does, decoding them on threads, batch by batch.

    Args:
        image_shape: (H, W, C) that the model takes.
        resize: bring images of another size to this one; else they are an error.
        progress: called as progress(done, total), first with 0, then after each batch.

    Returns:
        (N, D) float32 of unit rows, on the CPU.

    Raises:
        DataError: for images that cannot be decoded or are of another size; the first five of a
            batch are named.
        TypeError: where the model returns something else than `embed` takes.
        ValueError: for no images, a batch size under 1, and embeddings that are not finite, naming
            the images.

    Memory: the result, and three batches of decoded images.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    count, expected = len(store), None if resize else image_shape[:2]

    def read(pixels: np.ndarray, index: int) -> None:
        with store.open(index) as file:
            decode.read_into(pixels, file, expected)

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool, ThreadPoolExecutor(1) as ahead:

        def batch(begin: int) -> Tensor:
            indices = range(begin, min(begin + batch_size, count))
            images = np.empty((len(indices), *image_shape), np.uint8)
            done = list(pool.map(decode.attempt(read), images, indices))
            wrong = {
                store.name(i): text for i, (_, text) in zip(indices, done, strict=True) if text
            }
            decode.raise_if(
                wrong,
                f"of {len(indices)} images",
                f"images of {image_shape[0]}x{image_shape[1]} pixels (height x width)",
            )
            return torch.from_numpy(images)

        rows = []
        if progress is not None:
            progress(0, count)
        following = ahead.submit(batch, 0)
        for begin in range(0, count, batch_size):
            images = following.result()
            if begin + batch_size < count:
                following = ahead.submit(batch, begin + batch_size)
            rows.append(_embed(model, images, batch_size, flip, store.name, begin))
            if progress is not None:
                progress(begin + len(images), count)
    return torch.cat(rows)


def pixel_embeddings(images: Tensor, mean: Tensor | None = None) -> Tensor:
    """The baseline without learning: centered pixels as unit vectors.

    Args:
        images: (N, H, W, C) uint8, N at least 1.
        mean: (H, W, C), in the same 0-255 units, subtracted from every image; None subtracts from
            each image its own mean value, so the cosine is the pixels' correlation.

    Returns:
        (N, H*W*C) float32 of unit rows (zero where nothing is left).

    Raises:
        ValueError: for images of another dtype or shape, no images, or a mean of another shape.
    """
    _check_images(images)
    pixels = images.double().flatten(1)
    if mean is None:
        return F.normalize(pixels - pixels.mean(1, keepdim=True)).float()
    if mean.shape != images.shape[1:]:
        raise ValueError(
            f"mean must have the images' shape {tuple(images.shape[1:])}, got {tuple(mean.shape)}"
        )
    return F.normalize(pixels - mean.double().flatten()).float()


@dataclass(frozen=True, eq=False)
class Verification:
    """How well scores separate genuine pairs (same person) from impostor pairs.

    Attributes:
        accuracy: mean over the folds, by `verify` on as many genuine as impostor pairs (chance is
            0.5); None where pairs come without folds, and so are its deviation and threshold.
        accuracy_std: standard deviation over the folds (divided by their number).
        threshold: mean cosine, over the folds, from which a pair counts as the same person.
        auc: area under the ROC curve over all pairs, ties counted half.
        tar: for each requested false accept rate the highest true accept rate at a FAR not above
            it; None where there are too few impostor pairs to measure such a FAR.
        fpr, tpr: the ROC curve over all pairs, float64, from (0, 0) to (1, 1), corners only.
        pairs, genuine, impostor: how many pairs there are.
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
        """Aligned lines for people."""
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

    def to_json(self) -> dict:
        """All but the curve, ready for `json.dumps`."""
        return {
            "accuracy": self.accuracy,
            "accuracy_std": self.accuracy_std,
            "threshold": self.threshold,
            "auc": self.auc,
            "tar": {f"{far:g}": tar for far, tar in self.tar.items()},
            "pairs": self.pairs,
            "genuine": self.genuine,
            "impostor": self.impostor,
        }


def verify(
    embeddings: Tensor,
    labels: Tensor,
    folds: int = 10,
    fars: Sequence[float] = (1e-1, 1e-2, 1e-3),
    seed: int = 0,
) -> Verification:
    """Scores every pair of images by the cosine of their embeddings.

    ROC-AUC and TAR are over all pairs. Accuracy is over as many genuine as impostor pairs, the
    more numerous kind drawn at random without replacement and both kinds spread evenly over the
    folds: the threshold that is best on the other folds is applied to each.

    Args:
        embeddings: (N, D) floating, of any length (the cosine normalizes; a zero row has cosine 0).
        labels: (N,) integer.
        folds: at least 2.
        fars: false accept rates in (0, 1].
        seed: of the draw and the folds.

    Raises:
        ValueError: for wrong shapes or dtypes, non-finite embeddings, a kind of pair with fewer
            members than folds, or folds or fars out of range.

    Memory: about 8*N*N bytes for the cosines (float64) and 8*N*N more to sort them.
    """
    if embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise ValueError(
            "embeddings must be floating point of shape (N, D), "
            f"got {_kind(embeddings)} {tuple(embeddings.shape)}"
        )
    n = len(embeddings)
    integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if labels.shape != (n,) or not integer:
        raise ValueError(
            f"labels must be integer of shape ({n},), got {_kind(labels)} {tuple(labels.shape)}"
        )
    if folds < 2:
        raise ValueError(f"folds must be at least 2, got {folds}")
    embeddings, labels = embeddings.detach().cpu().double(), labels.cpu()
    if bad := int((~embeddings.isfinite()).any(1).sum()):
        raise ValueError(f"embeddings must be finite, got {bad} of {n} rows with nan or inf")

    unit = F.normalize(embeddings)
    cosines = unit @ unit.T
    upper = torch.ones(n, n, dtype=torch.bool, device="cpu").triu_(1)
    same = labels[:, None] == labels
    genuine = cosines[upper & same].numpy()
    impostor = cosines[upper & ~same].numpy()
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
    """Verification on given pairs, in given folds.

    The accuracy of a fold is that of its pairs at the threshold that is best on all other folds.

    Args:
        cosine: (P,) floating, finite: each pair's. same: (P,) bool, of the same person.
        fold: (P,) integer, at least two different; None measures no accuracy.
        fars: false accept rates in (0, 1].

    Raises:
        ValueError: for wrong shapes or dtypes, non-finite cosines, pairs of one kind alone, fewer
            than two folds, or fars out of range.

    Memory: about 100 bytes per pair.
    """
    count = len(cosine)
    if cosine.ndim != 1 or not cosine.is_floating_point() or not cosine.isfinite().all():
        raise ValueError(
            "cosine must be finite, floating point of shape (P,), "
            f"got {_kind(cosine)} {tuple(cosine.shape)}"
        )
    if same.shape != (count,) or same.dtype != torch.bool:
        raise ValueError(
            f"same must be bool of shape ({count},), got {_kind(same)} {tuple(same.shape)}"
        )
    scores, kinds = cosine.detach().cpu().double().numpy(), same.cpu().numpy()
    if not 0 < int(kinds.sum()) < count:
        raise ValueError(
            f"pairs must be of both kinds, got {int(kinds.sum())} genuine ones of {count}"
        )
    if fold is None:
        return _verification(scores[kinds], scores[~kinds], fars)
    if fold.shape != (count,) or fold.is_floating_point():
        raise ValueError(
            f"fold must be integer of shape ({count},), got {_kind(fold)} {tuple(fold.shape)}"
        )
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
    """Search of probes in a gallery.

    Attributes:
        rank1: the share of probes whose nearest gallery entry is of their own person.
        probes, gallery: how many there are.
    """

    rank1: float
    probes: int
    gallery: int


def identify(
    probe: Tensor, probe_people: Tensor, gallery: Tensor, gallery_people: Tensor
) -> Identification:
    """Rank-1 identification, closed set: each probe's person is in the gallery.

    Args:
        probe: (Q, D) and gallery: (G, D) floating, of any length, on one device.
        probe_people: (Q,) and gallery_people: (G,) integer.

    Raises:
        ValueError: for shapes that do not fit, and a probe of somebody who is not in the gallery.

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
    if not torch.isin(probe_people, gallery_people).all():
        raise ValueError("probe must hold people of the gallery alone")
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
    """(2, T+1) int64: genuine and impostor pairs accepted at no and at each distinct threshold."""
    scores = np.concatenate([genuine, impostor])
    order = np.argsort(-scores, kind="stable")
    is_genuine = order < len(genuine)
    last_of_its_score = np.r_[np.diff(scores[order]) != 0, True]
    counts = np.stack([np.cumsum(is_genuine), np.cumsum(~is_genuine)])[:, last_of_its_score]
    return np.pad(counts, ((0, 0), (1, 0)))


def _fold_accuracies(
    genuine: np.ndarray, impostor: np.ndarray, folds: int, seed: int
) -> tuple[np.ndarray, float]:
    """Each fold's accuracy at the threshold of the others, and the mean threshold."""
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
    """The score from which accepting errs least; midway in its gap, the highest among equals."""
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
    """The fewest impostor pairs among which one false accept is a rate of at most `far`."""
    count = math.floor(1.0 / far)
    return count if 1 / count <= far else count + 1


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0:
        raise ValueError(
            "images must be uint8 of shape (N, H, W, C) with N at least 1, "
            f"got {_kind(images)} {tuple(images.shape)}"
        )


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
