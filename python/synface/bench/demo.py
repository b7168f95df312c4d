"""The parts of the demonstration, and its report: figures, tables and results in JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import synface_kernels as sk

from ..common.rng import normals
from ..data import Faces
from ..evaluation.metrics import Verification
from ..evaluation.scores import ScoredPair, hardest_pairs, score_densities
from ..reporting import plots
from ..reporting.page import escape, table, write_page
from ..synthesis import open_generator, packing
from ..synthesis.controls import neutral_of
from .measure import METHODS, Workload

SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)  # of the first identity, and of the synthetic image
HARDEST = 5  # pairs shown of each kind,
HARDEST_OF = 10_000  # the hardest of so many, since one person may have hundreds
MIXED_SIZE = 64  # pixels of mixed faces
IDENTITY_SIZE = 64  # dimension of the generated identities' embeddings


@dataclass(frozen=True, eq=False)
class MixedFaces:
    """Faces of mixed identities, blended with a real face.

    Attributes:
        images: (φ, ψ, H, W, C) float32 in [0, 1], for the shares in `SHARES`.
        generator: the description of the generator of the synthetic faces.
        seconds: duration.
    """

    images: Tensor
    generator: dict[str, Any]
    seconds: float


def mix_faces(real: Tensor, seed: int) -> MixedFaces:
    """Return faces of two identities mixed by φ, each blended with a real face by ψ.

    Args:
        real: (H, H, C) uint8. seed: random seed of the two identities.
    """
    began = time.perf_counter()
    generator = open_generator(None, IDENTITY_SIZE, size=len(real))
    count = len(SHARES)
    shares = torch.tensor(SHARES, dtype=torch.float32, device="cpu")
    ends = F.normalize(normals((2, IDENTITY_SIZE), torch.Generator().manual_seed(seed)))
    first, second = (end.expand(count, -1) for end in ends)
    identities = F.normalize(sk.identity_mixup(first, second, shares))
    neutral = neutral_of(generator)
    seeds = torch.full((count,), seed, dtype=torch.int64, device="cpu")
    synthetic = generator.generate(identities, neutral.expand(count, -1), seeds)
    channels = max(synthetic.shape[-1], real.shape[-1])
    synthetic, target = (
        x.expand(count, *real.shape[:2], channels).repeat_interleave(count, 0)
        for x in (synthetic, real)
    )
    mixed = sk.domain_mixup(synthetic, target, shares.repeat(count), mean=0.0, std=1.0)
    images = mixed.permute(0, 2, 3, 1).unflatten(0, (count, count)).clamp(0.0, 1.0)
    return MixedFaces(images, generator.description, time.perf_counter() - began)


@dataclass(frozen=True, eq=False)
class PackedPoints:
    """A packing beside random points.

    Attributes:
        packed: the packing.
        nearest, random_nearest: (N,) cosines of each point's nearest neighbor.
        seconds: duration of the packing.
    """

    packed: packing.Packed
    nearest: np.ndarray
    random_nearest: np.ndarray
    seconds: float

    def numbers(self) -> dict[str, Any]:
        """Return the results, ready for `json.dumps`."""
        count, dim = self.packed.points.shape
        return {
            "points": count,
            "dimensions": dim,
            "steps": self.packed.config.steps,
            "worst_cosine": self.packed.worst,
            "random_worst_cosine": float(self.random_nearest.max()),
            "bound": self.packed.bound.cosine,
            "bound_name": self.packed.bound.name,
            "mean_nearest_cosine": float(self.nearest.mean()),
            "random_mean_nearest_cosine": float(self.random_nearest.mean()),
            "seconds": self.seconds,
        }


def pack_points(
    count: int, dim: int, steps: int, seed: int, progress: packing.PackingProgress | None = None
) -> PackedPoints:
    """Pack points, and compare the cosines of nearest neighbors with those of random points."""
    began = time.perf_counter()
    config = packing.PackConfig(count, dim, steps=steps, seed=seed)
    packed = packing.Packer(config).run(progress=progress)
    seconds = time.perf_counter() - began
    random = normals((count, dim), torch.Generator().manual_seed(seed)).to(packed.points.dtype)
    nearest, random_nearest = (
        sk.nearest_neighbors(points)[0][:, 0].double().numpy() for points in (packed.points, random)
    )
    return PackedPoints(packed, nearest, random_nearest, seconds)


@dataclass(frozen=True, eq=False)
class Recognition:
    """A trained network, and what it verifies.

    Attributes:
        history: the log row of each training step.
        learn, held: the images trained on, and those of people verified.
        embeddings: (N, D), of the verified images by the network.
        trained, pixels: the verification by the network, and by raw pixels.
        rate: training images per second.
    """

    history: Sequence[Mapping[str, float]]
    learn: Faces
    held: Faces
    embeddings: Tensor
    trained: Verification
    pixels: Verification
    rate: float


@dataclass(frozen=True)
class Softmax:
    """The measurements of the margin softmax: seconds and peak bytes of each method."""

    workload: Workload
    times: Mapping[str, Any]
    memory: Mapping[str, Any]
    implementation: str


def softmax_table(softmax: Softmax) -> list[list[str]]:
    """Return rows of: method, milliseconds, ratio to the fused op, rows/s, MiB above the inputs."""
    rows = [["forward + backward", "time", "against fused", "rows/s", "peak memory"]]
    fused = softmax.times.get("fused")
    for method in METHODS:
        label = f"fused ({softmax.implementation})" if method == "fused" else method
        seconds, peak = softmax.times.get(method), softmax.memory.get(method)
        ratio = throughput = "not measured"
        if isinstance(seconds, float):
            throughput = f"{softmax.workload.n / seconds:,.0f}"
            if isinstance(fused, float):
                ratio = f"{seconds / fused:.2f} ×"
        rows.append(
            [
                label,
                f"{seconds * 1e3:.0f} ms" if isinstance(seconds, float) else str(seconds),
                ratio,
                throughput,
                f"{peak / 2**20:.0f} MiB" if isinstance(peak, int) else str(peak),
            ]
        )
    return rows


def packing_table(points: PackedPoints) -> list[list[str]]:
    """Return rows of: points, worst cosine, mean cosine to the nearest neighbor."""
    bound = points.packed.bound
    return [
        ["points", "worst cosine", "mean cosine to the nearest neighbor"],
        ["packed", f"{points.packed.worst:.4f}", f"{points.nearest.mean():.4f}"],
        ["random", f"{points.random_nearest.max():.4f}", f"{points.random_nearest.mean():.4f}"],
        [f"lower bound ({bound.name})", f"{bound.cosine:.4f}", ""],
    ]


def face_grid(faces: Faces, path: Path, identities: int = 8, images: int = 10) -> None:
    """Draw some images of some identities, one identity a row."""
    shown = range(min(identities, len(faces.identities)))
    rows = [faces.images[faces.labels == label][:images].numpy() for label in shown]
    names = faces.identities[: len(rows)]
    plots.image_grid(rows, names, f"One identity a row: {faces.source}", path)


def _mixing_grid(mixed: MixedFaces, path: Path) -> None:
    ends = {1.0: "\nsynthetic", 0.0: "\nreal"}
    plots.image_grid(
        list(mixed.images.numpy()),
        [f"φ = {share:g}" for share in SHARES],
        "Identity mixup (rows) and domain mixup (columns)",
        path,
        [f"ψ = {share:g}{ends.get(share, '')}" for share in SHARES],
    )


def _packing_histogram(points: PackedPoints, path: Path) -> None:
    bound = points.packed.bound
    cosines = {"packed": points.nearest, "random": points.random_nearest}
    width = 0.005
    low, high = (
        round(function([function(x) for x in cosines.values()]) / width) for function in (min, max)
    )
    edges = np.arange(low - 1, high + 2) * width  # the same for both
    plots.densities(
        {
            f"{name}: worst {x.max():.4f}": (np.histogram(x, edges, density=True)[0], edges)
            for name, x in cosines.items()
        },
        path,
        title="{:,} points in {} dimensions".format(*points.packed.points.shape),
        x="cosine to the nearest neighbor",
        lines={f"{bound.name} bound {bound.cosine:.4f} of the worst cosine": bound.cosine},
        log=True,  # the packed points' are nearly all the same
    )


def _hardest(found: Recognition, path: Path) -> dict[str, list[dict[str, Any]]]:
    """Draw the hardest pairs, one of each person or two people, and return them."""
    held = found.held
    people = [held.identities[label] for label in held.labels.tolist()]
    kinds = zip(
        ("genuine", "impostor"),
        hardest_pairs(found.embeddings, held.labels, HARDEST_OF),
        strict=True,
    )
    groups, listed = {}, {}
    for kind, pairs in kinds:
        one_each: dict[tuple[str, ...], ScoredPair] = {}
        for pair in pairs:
            both = sorted({people[pair.first], people[pair.second]})
            one_each.setdefault(tuple(both), pair)
        shown = list(one_each.items())[:HARDEST]
        groups[kind] = [
            (held.images[i].numpy(), held.images[j].numpy(), f"{score:.3f}\n{', '.join(both)}")
            for both, (score, i, j) in shown
        ]
        listed[kind] = [
            {"score": score, "images": [i, j], "people": [people[i], people[j]]}
            for _, (score, i, j) in shown
        ]
    title = "Genuine pairs of the lowest scores, one per person; impostor pairs of the highest"
    plots.image_pairs(groups, f"{title}, one per two people", path)
    return listed


def _scores(found: Recognition, path: Path) -> dict[str, list[float]]:
    """Draw the densities of the scores, and return them."""
    scores, trained = score_densities(found.embeddings, found.held.labels), found.trained
    plots.score_histogram(
        scores,
        path,
        genuine=trained.genuine,
        impostor=trained.impostor,
        threshold=trained.threshold,
    )
    return {name: values.tolist() for name, values in vars(scores).items()}


def write(
    folder: Path,
    *,
    faces: Faces,
    mixed: MixedFaces,
    points: PackedPoints,
    softmax: Softmax,
    recognition: Recognition,
    about: Mapping[str, Any],
    seconds: float,
) -> Path:
    """Write the report and return its page, ``index.html``.

    Args:
        about: date, versions and machine, of JSON's types.
        seconds: duration of the demonstration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trained, pixels = recognition.trained, recognition.pixels
    learn, held = recognition.learn, recognition.held
    face_grid(faces, folder / "faces.png")
    _mixing_grid(mixed, folder / "mixing.png")
    _packing_histogram(points, folder / "packing.png")
    plots.loss_curve(recognition.history, folder / "loss.png")
    plots.roc_curves(
        {"trained network": trained, "raw pixels": pixels},
        folder / "roc.png",
        title="Verification of people never trained on",
    )
    workload = softmax.workload
    result = {
        "data": faces.source,
        "mixing": {
            "phi": SHARES,
            "psi": SHARES,
            "generator": mixed.generator,
            "seconds": mixed.seconds,
        },
        "packing": points.numbers(),
        "margin softmax": {
            "n": workload.n,
            "d": workload.d,
            "c": workload.c,
            "dtype": "float32",
            "seconds": dict(softmax.times),
            "peak_bytes": dict(softmax.memory),
        },
        "training": {
            "people": len(learn.identities),
            "images": len(learn),
            "steps": len(recognition.history),
            "images_per_second": recognition.rate,
        },
        "verification": {
            "people": len(held.identities),
            "images": len(held),
            "trained": trained.to_json(),
            "raw pixels": pixels.to_json(),
            "score_densities": _scores(recognition, folder / "scores.png"),
            "hardest_pairs": _hardest(recognition, folder / "hardest.png"),
        },
        **about,
        "seconds": seconds,
    }
    (folder / "report.json").write_text(json.dumps(result, indent=1))
    text = Path(__file__).with_name("demo.md").read_text(encoding="utf-8").format(
        source=escape(faces.source),
        about="\n".join(f"- {escape(f'{key}: {value}')}" for key, value in about.items()),
        seconds=seconds,
        size=escape("×".join(map(str, learn.images.shape[1:3]))),
        mixed=mixed,
        points=points.packed.config,
        packing=_markdown(packing_table(points)),
        packing_seconds=points.seconds,
        recognition=recognition,
        learn_images=len(learn),
        learn_people=len(learn.identities),
        held_images=len(held),
        held_people=len(held.identities),
        trained=trained.summary(),
        pixels=pixels.summary(),
        workload=workload,
        softmax=_markdown(softmax_table(softmax)),
        gradients=(workload.n + workload.c) * workload.d * 4 / 2**20,
    )  # fmt: skip
    write_page(folder / "index.html", text)
    return folder / "index.html"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return table(head, [[escape(cell) for cell in row] for row in body])
