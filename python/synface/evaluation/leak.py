"""Leaks: how near the images of one set are to those of another, and reports of it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

import synface_kernels as sk

from ..common.files import write_text
from ..data.formats import decode
from ..data.formats.images import Store
from ..reporting import plots
from .embedding import doubled
from .scores import check_labeled

BLOCK = 8192  # rows that are compared with all others at once
NUMBERS = 1 << 22  # of a block's unit vectors
BATCH = 1024  # images whose digests are computed before errors are raised
QUANTILES = {0.5: "median", 0.9: "90 %", 0.99: "99 %", 1.0: "maximum"}
REPORT, NEAREST, CLOSEST = "leak.json", "nearest.png", "closest.png"
COLUMNS = 5  # of a picture's pairs
PICTURE = 112  # pixels of an image's height in a picture, at least
CAPTION = 26  # characters of a name in a picture


@dataclass(frozen=True, eq=False)
class Leak:
    """The nearness of synthetic to real data.

    Attributes:
        nearest: (N,) each synthetic row's cosine to its nearest real row.
        context: (M,) each real row's cosine to its nearest real row ``of``, such as "another
            identity"; None where there is none.
        of: what the context compares with.
        threshold: cosine above which a pair counts as a leak; None if none was given.
        above: number of pairs of a synthetic and a real row above it; None without a threshold.
        closest: the closest pairs: cosine, synthetic row, real row; nearest first.
        copies: synthetic and real rows that are exactly equal; each synthetic row occurs once.
    """

    nearest: Tensor
    context: Tensor | None
    of: str
    threshold: float | None
    above: int | None
    closest: Sequence[tuple[float, int, int]]
    copies: Sequence[tuple[int, int]]

    def statistics(self) -> dict[str, dict[str, Any]]:
        """Return quantiles of the cosines, and how many exceed the threshold, by their names."""
        both = {"synthetic to real": self.nearest}
        if self.context is not None:
            both[f"real to {self.of}"] = self.context
        return {name: self._statistics(cosines) for name, cosines in both.items()}

    def _statistics(self, cosines: Tensor) -> dict[str, Any]:
        values = cosines.double().cpu().numpy()
        # An order statistic, so that a quantile is one of the cosines.
        found = np.quantile(values, list(QUANTILES), method="inverted_cdf").tolist()
        result: dict[str, Any] = {"rows": len(values)}
        result["quantiles"] = dict(zip(QUANTILES.values(), found, strict=True))
        if self.threshold is not None:
            above = int((values > self.threshold).sum())
            result |= {"above_threshold": above, "share_above_threshold": above / len(values)}
        return result


def nearest_of_another(
    embeddings: Tensor, labels: Tensor, *, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """Return each row's greatest cosine to a row of another label.

    Exact: cosines in double precision, rounded to float32 (float64 for float64 rows).

    Args:
        embeddings: (N, D) floating, of any length, no row zero. labels: (N,) integer, of two values
            or more.
        progress: called as progress(done, total) with numbers of rows, after each block of them.

    Returns:
        (N,) float32 or float64.

    Raises:
        ValueError: for wrong shapes or dtypes, labels of one value, and rows that are zero or not
            finite.

    Memory: a copy of the embeddings unless labels ascend, that of `sk.nearest_neighbors`, and
    the unit vectors and cosines of a block of labels with at most 8192 rows, or of one label.
    """
    check_labeled(embeddings, labels, nonzero=True)
    labels, order = labels.to(embeddings.device).sort(stable=True)
    ascend = bool((order.diff() > 0).all())
    rows = embeddings if ascend else embeddings[order]
    sizes = labels.unique_consecutive(return_counts=True)[1].tolist()
    if len(sizes) < 2:
        raise ValueError(f"labels must have at least 2 values, got {len(sizes)}")
    parts = []
    for begin, end in _blocks(sizes, max(256, min(BLOCK, NUMBERS // rows.shape[1]))):
        block = rows[begin:end]
        found = [
            sk.nearest_neighbors(block, others)[0][:, 0]
            for others in (rows[:begin], rows[end:])
            if len(others)
        ]
        if labels[begin] != labels[end - 1]:
            found.append(_within(block, labels[begin:end]))
        parts.append(torch.stack([each.double() for each in found]).amax(0))
        if progress is not None:
            progress(end, len(rows))
    kind = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    ordered = torch.cat(parts).to(kind)
    return torch.empty_like(ordered).index_copy_(0, order, ordered)


def _blocks(sizes: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows that hold whole labels: as many as fit into ``most`` rows, or one."""
    begin = end = 0
    for size in sizes:
        if end > begin and end + size - begin > most:
            yield begin, end
            begin = end
        end += size
    yield begin, end


def _within(rows: Tensor, labels: Tensor) -> Tensor:
    """Return each row's greatest cosine to a row of another label, float64."""
    unit = doubled(rows.detach())
    unit = F.normalize(unit / unit.abs().amax(1, keepdim=True))  # no square overflows
    labels = labels.to(unit.device)
    return torch.cat(
        [
            (part @ unit.T).masked_fill_(own[:, None] == labels, -torch.inf).amax(1)
            for part, own in zip(unit.split(512), labels.split(512), strict=True)
        ]
    )


def pixel_digests(
    store: Store, *, progress: Callable[[int, int], None] | None = None
) -> list[bytes]:
    """Return a digest of each image's decoded pixels, in the image's own size.

    Images of equal pixels have equal digests, in whatever format they are stored; so have a gray
    image and an RGB image of three equal channels.

    Args:
        progress: called as progress(done, total), first with 0, then after each batch.

    Raises:
        DataError: for images that cannot be decoded; the first five of a batch are named.
    """

    def digest(index: int) -> bytes:
        pixels = store.decode(index)
        if pixels.shape[2] == 3 and (pixels == pixels[..., :1]).all():
            pixels = pixels[..., :1]
        return sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()

    found: list[bytes] = []
    if progress is not None:
        progress(0, len(store))
    with ThreadPoolExecutor(1 if store.streams else min(4, os.cpu_count() or 1)) as pool:
        while len(found) < len(store):
            indices = range(len(found), min(len(found) + BATCH, len(store)))
            done = list(pool.map(decode.attempt(digest), indices))
            wrong = {
                store.name(i): text for i, (_, text) in zip(indices, done, strict=True) if text
            }
            decode.raise_if(wrong, f"of {len(indices)} images", "readable, complete images")
            found += [each for each, _ in done]
            if progress is not None:
                progress(len(found), len(store))
    return found


def row_digests(rows: Tensor) -> list[bytes]:
    """Return a digest of each row's bits."""
    return [sha256(row.tobytes()).digest() for row in rows.detach().cpu().contiguous().numpy()]


def copies(digests: Sequence[bytes], among: Sequence[bytes]) -> list[tuple[int, int]]:
    """Return the index of each digest that occurs among others, and its first index there."""
    first: dict[bytes, int] = {}
    for index, digest in enumerate(among):
        first.setdefault(digest, index)
    return [(index, first[each]) for index, each in enumerate(digests) if each in first]


def write(
    folder: Path,
    leak: Leak,
    about: Mapping[str, Any],
    names: Callable[[str, int], dict[str, Any]],
    pictures: Callable[[str, int], NDArray[np.uint8]] | None = None,
    most: int = 20,
) -> list[Path]:
    """Write leak.json, a plot of the nearest cosines, and pictures of the closest pairs.

    Args:
        about: further facts for the report, of JSON's types.
        names: returns facts about a row of "synthetic" or "real", "name" among them if it has one.
        pictures: returns a row's image (H, W, C), all of one shape; None if rows have none.
        most: number of pairs in the picture.

    Returns:
        The files' paths.
    """
    os.makedirs(folder, exist_ok=True)

    def pair(synthetic: int, real: int) -> dict[str, Any]:
        rows = {"synthetic": synthetic, "real": real}
        return {side: {"row": row} | names(side, row) for side, row in rows.items()}

    report = dict(about) | {
        "threshold": leak.threshold,
        "pairs_above_threshold": leak.above,
        "nearest": leak.statistics(),
        "copies": len(leak.copies),
        "first_copies": [pair(*rows) for rows in leak.copies[: len(leak.closest)]],
        "closest": [{"cosine": cosine} | pair(i, j) for cosine, i, j in leak.closest],
    }
    write_text(folder / REPORT, json.dumps(report, indent=1) + "\n")
    _plot(leak, folder / NEAREST)
    written = [folder / REPORT, folder / NEAREST]
    if pictures is not None:
        shown = [
            (
                pictures("synthetic", i),
                pictures("real", j),
                "\n".join([f"{cosine:.4f}", *(_caption(names(*row)) for row in
                          (("synthetic", i), ("real", j)))]),
            )
            for cosine, i, j in leak.closest[:most]
        ]  # fmt: skip
        rows = range(0, len(shown), COLUMNS)
        groups = {f"{at + 1} to {min(at + COLUMNS, len(shown))}": shown[at : at + COLUMNS]
                  for at in rows}  # fmt: skip
        with warnings.catch_warnings():  # of characters that the font lacks
            warnings.filterwarnings("ignore", message="Glyph")
            title = "Closest pairs: synthetic on the left, real on the right"
            plots.image_pairs(groups, title, folder / CLOSEST)
        written.append(folder / CLOSEST)
    return written


def _caption(facts: Mapping[str, Any]) -> str:
    """Return the end of a row's name."""
    name = "/".join(Path(str(facts.get("name", ""))).parts[-2:])
    return plots.literal(name if len(name) <= CAPTION else "…" + name[1 - CAPTION :])


def _plot(leak: Leak, path: Path) -> None:
    parts = {"synthetic to the nearest real": leak.nearest}
    if leak.context is not None:
        parts[f"real to the nearest of {leak.of}"] = leak.context
    values = {name: each.double().cpu().numpy() for name, each in parts.items()}
    low = min(float(each.min()) for each in values.values())
    high = max(float(each.max()) for each in values.values())
    margin = 0.01 * (high - low) + 1e-6
    bins = plots.bins_of(min(map(len, values.values())))
    edges = np.linspace(low - margin, high + margin, bins + 1)
    width = edges[1] - edges[0]
    lines = {} if leak.threshold is None else {f"threshold {leak.threshold:g}": leak.threshold}
    plots.densities(
        {
            name: (np.histogram(each, edges)[0] / len(each) / width, edges)
            for name, each in values.items()
        },
        path,
        title="Nearest neighbors of each row",
        x="cosine to the nearest neighbor",
        lines=lines,
    )
