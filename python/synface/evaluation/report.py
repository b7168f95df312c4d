"""Evaluation of a network on verification sets, and its report."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..common.files import write_text
from ..reporting import page, plots
from .embedding import embed_store
from .metrics import Identification, Verification, identify, verify_pairs
from .scores import PairScores, scores_of_pairs
from .sets import PairSet, TemplateSet

FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class SetResult:
    """A network's results on a verification set.

    Attributes:
        name, source: of the set. images: number of images, embedded in ``seconds``.
        verification: on its pairs. identification: None if the set does not identify people.
        scores: of its pairs, to be drawn; None if they are not.
    """

    name: str
    source: str
    images: int
    seconds: float
    verification: Verification
    identification: Identification | None
    scores: PairScores | None = None


def evaluate_set(
    model: nn.Module,
    data: PairSet | TemplateSet,
    image_shape: tuple[int, int, int],
    *,
    batch_size: int = 256,
    flip: bool = True,
    resize: bool = False,
    fars: Sequence[float] = FARS,
    scores: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> SetResult:
    """Embed a set's images on the model's device, and verify its pairs.

    Rank-1 identification uses, in a `PairSet` that identifies people, each person's first image as
    gallery and the others as probes; in a `TemplateSet`, its gallery and probe lists.

    Args:
        model, image_shape, batch_size, flip, resize, progress: as `embed_store`.
        fars: as `verify_pairs`.
        scores: also return the densities of scores and the hardest pairs, which a report draws.

    Raises: as `embed_store` and `verify_pairs`.

    Memory: the embeddings, (N, D) float32, and that of `verify_pairs`.
    """
    began = time.perf_counter()
    rows = embed_store(
        model,
        data.store,
        image_shape,
        batch_size=batch_size,
        flip=flip,
        resize=resize,
        progress=progress,
    )
    seconds = time.perf_counter() - began
    fold, found, images = None, None, None
    if isinstance(data, TemplateSet):
        rows = pool(rows, torch.from_numpy(data.template), torch.from_numpy(data.media))
        if data.gallery is not None and data.probe is not None:
            probe, gallery = torch.from_numpy(data.probe), torch.from_numpy(data.gallery)
            found = identify(rows[probe[:, 0]], probe[:, 1], rows[gallery[:, 0]], gallery[:, 1])
    else:
        images, fold = data.store, torch.from_numpy(data.fold)
        if data.people is not None:
            people = torch.from_numpy(data.people)
            first = torch.zeros_like(people, dtype=torch.bool)
            first[torch.from_numpy(np.unique(data.people, return_index=True)[1])] = True
            if not first.all():
                found = identify(rows[~first], people[~first], rows[first], people[first])
    first, second = torch.from_numpy(data.first), torch.from_numpy(data.second)
    cosine, same = pair_cosines(rows, first, second), torch.from_numpy(data.same)
    result = verify_pairs(cosine, same, fold, fars)
    drawn = scores_of_pairs(cosine, same, first, second, images) if scores else None
    return SetResult(data.name, data.source, len(data.store), seconds, result, found, drawn)


def pool(rows: Tensor, template: Tensor, media: Tensor) -> Tensor:
    """Return embeddings of templates: means over each media's images, summed over the media.

    Args:
        rows: (N, D) floating, unit rows. template: (N,) int64 in [0, T). media: (N,) int64, which
            identifies media within one template only.

    Returns:
        (T, D) unit rows of the rows' dtype.

    Memory: (M, D) for M pairs of template and media, twice.

    Source: Whitelam et al., "IARPA Janus Benchmark-B", CVPRW 2017; media are pooled as insightface
        does.
    """
    both, index = torch.unique(torch.stack([template, media], 1), dim=0, return_inverse=True)
    means = rows.new_zeros(len(both), rows.shape[1]).index_add_(0, index, rows)
    means /= torch.bincount(index, minlength=len(both))[:, None]
    sums = rows.new_zeros(int(template.max()) + 1, rows.shape[1])
    return F.normalize(sums.index_add_(0, both[:, 0], means))


def pair_cosines(rows: Tensor, first: Tensor, second: Tensor, at_once: int = 1 << 14) -> Tensor:
    """Return the cosines of pairs of (N, D) unit rows, (P,) of their dtype, by blocks of pairs."""
    parts = [
        torch.linalg.vecdot(rows[i], rows[j])
        for i, j in zip(first.split(at_once), second.split(at_once), strict=True)
    ]
    return torch.cat(parts)


def table(results: Sequence[SetResult]) -> list[list[str]]:
    """Return a heading and a row for each set, without false accept rates that no set measures."""
    fars = [far for far in FARS if any(r.verification.tar.get(far) is not None for r in results)]
    rows = [["set", "pairs", "accuracy", "ROC-AUC", *(f"TAR@{far:g}" for far in fars), "rank 1"]]
    for result in results:
        v, found = result.verification, result.identification
        tars = [v.tar.get(far) for far in fars]
        rows.append(
            [
                result.name,
                f"{v.pairs:,}",
                NOT_MEASURED if v.accuracy is None else f"{v.accuracy:.4f} ± {v.accuracy_std:.4f}",
                f"{v.auc:.4f}",
                *(NOT_MEASURED if tar is None else f"{tar:.4f}" for tar in tars),
                NOT_MEASURED if found is None else f"{found.rank1:.4f}",
            ]
        )
    return rows


def write(
    folder: Path,
    results: Sequence[SetResult],
    about: Mapping[str, Any],
    *,
    image_shape: tuple[int, int, int] = (112, 112, 3),
    title: str = "Verification",
    pictures: Mapping[str, str] | None = None,
) -> Path:
    """Write results.json, roc.png, det.png, scores and hardest pairs, and a page; return its path.

    Args:
        about: further facts for the report, of JSON's types.
        image_shape: (H, W, C) in which pairs of images are shown.
        title: of the page.
        pictures: files that are in the folder already and come first on the page, by description.
    """
    os.makedirs(folder, exist_ok=True)
    names = Counter(result.name for result in results)
    results = [
        replace(result, name=f"{result.name} ({i})") if names[result.name] > 1 else result
        for i, result in enumerate(results, 1)
    ]
    curves = {result.name: result.verification for result in results}
    plots.roc_curves(curves, folder / "roc.png", title="ROC curves")
    plots.roc_curves(curves, folder / "det.png", title="DET curves", det=True)
    shown = dict(pictures or {}) | {"ROC curves": "roc.png", "DET curves": "det.png"}
    drawn = [result for result in results if result.scores]
    for number, result in enumerate(drawn, 1):
        assert result.scores is not None
        suffix = f"-{number}" if len(drawn) > 1 else ""
        v, heading = result.verification, f"Scores of pairs: {result.name}"
        shown[heading] = f"scores{suffix}.png"
        counts: Any = {"genuine": v.genuine, "impostor": v.impostor, "threshold": v.threshold}
        densities, file = result.scores.densities, folder / f"scores{suffix}.png"
        plots.score_histogram(densities, file, title=heading, **counts)
        if result.scores.images is not None:
            shown[f"Hardest pairs of {result.name}"] = f"hardest{suffix}.png"
            _draw_hardest(result, result.scores, image_shape, folder / f"hardest{suffix}.png")
    sets = [
        {
            "name": result.name,
            "source": result.source,
            "images": result.images,
            "seconds": result.seconds,
            "verification": result.verification.to_json(),
            "identification": result.identification and asdict(result.identification),
            "scores": result.scores and result.scores.to_json(),
        }
        for result in results
    ]
    write_text(folder / "results.json", json.dumps({"about": dict(about), "sets": sets}, indent=1))
    head, *rows = table(results)
    template = Path(__file__).with_name("report.md").read_text(encoding="utf-8")
    text = template.format(
        title=page.escape(title),
        about="\n".join(f"- {page.escape(f'{key}: {value}')}" for key, value in about.items()),
        table=page.table(head, [[page.escape(cell) for cell in row] for row in rows]),
        pictures="\n\n".join(f"![{page.escape(alt)}]({file})" for alt, file in shown.items()),
    )
    page.write_page(folder / "index.html", text)
    return folder / "index.html"


def _draw_hardest(
    result: SetResult, scores: PairScores, image_shape: tuple[int, int, int], path: Path
) -> None:
    """Draw the genuine pairs of the lowest and the impostor pairs of the highest score."""
    *size, channels = image_shape

    def image(row: int) -> NDArray[np.uint8]:
        assert scores.images is not None
        return scores.images.decode(row, (size[0], size[1]), channels)

    groups = {
        name: [(image(i), image(j), f"{score:.3f}") for score, i, j in pairs]
        for name, pairs in (("genuine", scores.genuine), ("impostor", scores.impostor))
        if pairs
    }
    title = f"Genuine pairs of the lowest and impostor pairs of the highest score: {result.name}"
    plots.image_pairs(groups, title, path)
