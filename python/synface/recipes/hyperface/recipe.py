"""HyperFace from packing to verification: identities → faces → training → real people.

Identities that are packed on the sphere, also with HyperFace's gallery term, and identities whose
faces are far apart, are compared with as many random ones: with the same face generator, styles
and training.

Source: Shahreza, Marcel, "HyperFace: Generating Synthetic Face Recognition Datasets by Exploring
Face Embedding Hypersphere", ICLR 2025.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import synface_kernels as sk

from ... import checkpoint
from ...common.check import check_integers, check_memory
from ...common.config import load_recipe
from ...common.extras import extra
from ...common.files import write_tensors
from ...common.rng import generator as draws
from ...common.rng import normals
from ...data import Faces
from ...evaluation.embedding import embed, pixel_embeddings
from ...synthesis.controls import neutral_of
from ...synthesis.embeddings import NAME, read_embeddings
from ...synthesis.generators import FaceGenerator
from ...synthesis.packing import PackConfig, Packer, farthest_points
from ...synthesis.sources import GeneratedSource
from ...training.config import TrainConfig
from ...training.sources import Source
from ..generated import DatasetConfig, check_choices, check_seeds, identities
from ..sweep import (
    Bars,
    Cell,
    SweepResults,
    for_steps,
    generated_source,
    open_faces,
    run_cells,
    run_times,
    trained_network,
    verify_pixels,
)

RANDOM, PACKED, GALLERY, BY_FACES = "random", "packed", "packed, gallery", "packed by faces"
KINDS = (RANDOM, PACKED, GALLERY, BY_FACES)
RECOGNIZER = "recognizer"  # the cell of the network that compares faces
BATCH = 64  # faces per call of the generator


@dataclass(frozen=True)
class DataConfig(DatasetConfig):
    """The generated faces, and the real people to verify on; see hyperface.toml."""

    embedding_size: int = 512


@dataclass(frozen=True)
class PackingConfig:
    """Configuration of the packing; see `synface.synthesis.packing.PackConfig`.

    Attributes:
        objective, steps: of "packed" and of "packed, gallery".
        gallery: number of random identities that "packed, gallery" stays near.
        alpha: weight of the gallery term.
        candidates: random identities for each one that "packed by faces" selects.
    """

    objective: str = "lse"
    steps: int = 500
    gallery: int = 10_000
    alpha: float = 0.5
    candidates: int = 20

    def __post_init__(self) -> None:
        PackConfig(2, 2, self.objective, self.steps, alpha=self.alpha)
        check_integers(self, gallery=1, candidates=1)


@dataclass(frozen=True)
class HyperfaceConfig:
    """Configuration of the whole recipe, see hyperface.toml; the defaults are the paper's sizes.

    Attributes:
        kinds: of identities; the others are compared with the first.
        recognizer_seed: random seed of the network that compares faces, and of its identities.
        recognizer_epochs: of its training.
    """

    seeds: tuple[int, ...] = tuple(range(10))
    kinds: tuple[str, ...] = KINDS
    recognizer_seed: int = 1000
    recognizer_epochs: int = 40
    data: DataConfig = field(default_factory=DataConfig)
    pack: PackingConfig = field(default_factory=PackingConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_seeds(self.seeds)
        check_choices("kinds", self.kinds, KINDS)
        if len(self.kinds) < 2:
            raise ValueError(
                f"kinds must be two or more, which are compared, got {list(self.kinds)}"
            )
        check_integers(self, recognizer_seed=0, recognizer_epochs=1)
        if self.recognizer_seed in self.seeds:
            raise ValueError(
                f"recognizer_seed must be none of seeds, so that the recognizer does not depend on "
                f"the kinds, got {self.recognizer_seed}"
            )
        if GALLERY in self.kinds:
            try:
                self.packing(self.seeds[0]).resolved(gallery=True)
            except ValueError as error:
                raise ValueError(f"pack, for the identities {GALLERY!r}: {error}") from None

    def packing(self, seed: int) -> PackConfig:
        """Return the configuration of a seed's packing."""
        data, pack = self.data, self.pack
        return PackConfig(
            data.identities,
            data.embedding_size,
            pack.objective,
            pack.steps,
            alpha=pack.alpha,
            seed=seed,
        )


def load_config(file: Path | None = None, *, quick: bool = False) -> HyperfaceConfig:
    """Return a configuration from TOML, by default hyperface.toml; see `load_recipe`."""
    return load_recipe(HyperfaceConfig, Path(__file__).with_name("hyperface.toml"), file, quick)


def cell_name(kind: str, seed: int) -> str:
    """Return the name of the training run of a kind of identities with a seed."""
    return f"{kind.replace(',', '').replace(' ', '-')}-seed-{seed}"


# -- identities ----------------------------------------------------------------------------------


def points_of(
    config: HyperfaceConfig,
    generator: FaceGenerator,
    output: Path,
    kind: str,
    seed: int,
    resume: bool = False,
) -> Tensor:
    """Return (N, D) identities of a kind, unit rows, float32.

    Those that are not random are stored in ``output``/KIND-seed-N.safetensors.

    Args:
        resume: read the file if it exists, and resume a packing that was begun.

    Raises:
        ValueError: for a file that is damaged or was made by another configuration.
        FileExistsError: if there is a file or a packing, and ``resume`` is not set.
    """
    count, dim = config.data.identities, config.data.embedding_size
    if kind == RANDOM:
        return identities(count, dim, seed)
    file = output / f"{cell_name(kind, seed)}.safetensors"
    begun = file.with_suffix(".checkpoints")
    made_of: dict[str, Any]
    find: Callable[[], Tensor]
    if kind == BY_FACES:
        candidates = config.pack.candidates * count
        made_of = {"count": count, "dim": dim, "seed": seed, "candidates": candidates}
        made_of |= {"generator": generator.description}
        find = partial(_packed_by_faces, generator, _random(candidates, dim, seed, kind), count)
    else:
        packing = config.packing(seed)
        made_of = dict(packing.metadata())
        gallery = None
        if kind == GALLERY:
            gallery = _random(config.pack.gallery, dim, seed, kind)
            made_of |= {"gallery": len(gallery)}
        packer = Packer(packing, gallery=gallery)
        find = partial(_packed, packer, begun, resume)
    metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in made_of.items()}
    if not file.exists():
        output.mkdir(parents=True, exist_ok=True)
        write_tensors(file, {NAME: find()}, metadata)
        shutil.rmtree(begun, ignore_errors=True)
    elif not resume:
        raise FileExistsError(f"{file} exists: resume the run, or choose another output folder")
    points = read_embeddings(file)
    with extra("train", file):
        from safetensors import safe_open

    with safe_open(file, framework="pt") as stored:
        checkpoint.check_same(file, stored.metadata() or {}, metadata)
    return F.normalize(points)


def _random(count: int, dim: int, seed: int, purpose: str) -> Tensor:
    """Return (count, dim) random identities that are independent of those of other purposes."""
    return F.normalize(normals((count, dim), draws(seed, purpose, 0)))


def _packed(packer: Packer, folder: Path, resume: bool) -> Tensor:
    """Return a packing, whose checkpoints are in a folder."""
    return packer.run(folder, resume=resume and bool(checkpoint.checkpoints(folder))).points


def _packed_by_faces(generator: FaceGenerator, candidates: Tensor, count: int) -> Tensor:
    """Return those of the candidates whose faces are far apart.

    The packing of embeddings is undone where the generator draws similar faces for embeddings that
    are far apart. This one is in the metric of the faces: greedy farthest-point selection by
    pixels, in the neutral style, less the candidates' mean face. It needs nothing of the generator
    but its images.

    Source: Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985.
    """
    faces = neutral_faces(generator, candidates)
    return candidates[farthest_points(faces.flatten(1).float(), count)]


# -- their faces ---------------------------------------------------------------------------------


def neutral_faces(generator: FaceGenerator, points: Tensor) -> Tensor:
    """Return (N, H, W, C) uint8, a face of each identity in the generator's neutral style."""
    height, width, channels = generator.image_shape
    # The bytes, and two copies in float64, one of them less the mean face.
    check_memory(
        f"faces of {len(points):,} identities", 17 * len(points) * height * width * channels
    )
    style = neutral_of(generator)
    noise = torch.zeros(BATCH, dtype=torch.int64, device="cpu")
    return torch.cat(
        [
            generator.generate(part, style.expand(len(part), -1), noise[: len(part)])
            for part in points.split(BATCH)
        ]
    )


def _nearest_cosines(rows: Tensor) -> Tensor:
    return sk.nearest_neighbors(rows)[0][:, 0]


def _nearest_distances(faces: Tensor) -> Tensor:
    """Return (N,) the root mean square of the pixels' differences to the nearest other face."""
    rows = faces.flatten(1).double()
    found = []
    for start in range(0, len(rows), BATCH):
        distance = torch.cdist(rows[start : start + BATCH], rows)
        distance.diagonal(start).fill_(torch.inf)
        found.append(distance.amin(1))
    return torch.cat(found) / rows.shape[1] ** 0.5


# -- training runs -------------------------------------------------------------------------------


def cells(
    config: HyperfaceConfig, generator: FaceGenerator, output: Path, resume: bool
) -> list[Cell]:
    """Return the recognizer's cell, and one for each seed and kind, whose source packs."""
    data = config.data
    images = data.identities * data.images_per_identity

    recognizer = partial(
        generated_source,
        data,
        generator,
        data.identities,
        data.images_per_identity,
        config.recognizer_seed,
        mixup=False,
        keep_epochs=1,
    )
    steps = config.recognizer_epochs * -(-images // config.train.batch_size)
    training = replace(for_steps(config.train, images, steps), seed=config.recognizer_seed)
    found = [Cell(RECOGNIZER, training, recognizer, images, generator, generated=images)]
    for seed in config.seeds:
        for kind in config.kinds:
            source = partial(_source, config, generator, output, kind, seed, resume)
            more = config.pack.candidates * data.identities if kind == BY_FACES else 0
            name, training = cell_name(kind, seed), replace(config.train, seed=seed)
            found.append(Cell(name, training, source, images, generator, generated=images + more))
    return found


def _source(
    config: HyperfaceConfig,
    generator: FaceGenerator,
    output: Path,
    kind: str,
    seed: int,
    resume: bool,
) -> Source:
    points = points_of(config, generator, output, kind, seed, resume)
    images = config.data.images_per_identity
    return GeneratedSource(points, generator, images, seed=seed, keep_epochs=1)


@dataclass(frozen=True, eq=False)
class Results(SweepResults):
    """The metrics of the recipe's training runs, with the identities and their cosines.

    Attributes:
        points: by kind, for each seed: the (N, D) identities.
        cosines: likewise: the (N,) cosine of each identity with its nearest one.
        face_cosines: likewise, of the pixels of their faces in the neutral style, less the mean
            face.
        face_distances: likewise, the distance of the pixels to the nearest face, in gray levels:
            root mean square.
        recognizer_cosines: likewise, of the embeddings of these faces by the recognizer.
    """

    config: HyperfaceConfig
    points: dict[str, list[Tensor]]
    cosines: dict[str, list[Tensor]]
    face_cosines: dict[str, list[Tensor]]
    face_distances: dict[str, list[Tensor]]
    recognizer_cosines: dict[str, list[Tensor]]


def run(
    config: HyperfaceConfig,
    output: Path,
    *,
    resume: bool = False,
    only: str | None = None,
    progress: Bars | None = None,
    workers: int | None = 1,
) -> Results:
    """Pack, train and verify below ``output``; options and errors are those of `run_cells`.

    With ``only`` the results have no identities and cosines.
    """
    generator, held = open_faces(config.data, config.train, 2)
    pixels = verify_pixels(held)
    found = run_cells(
        cells(config, generator, output, resume),
        held,
        output,
        resume=resume,
        only=only,
        progress=progress,
        workers=workers,
        open_cells=partial(_open_cells, config, output, resume),
    )
    by_kind: list[dict[str, list[Tensor]]] = [{kind: [] for kind in config.kinds} for _ in range(5)]
    if only is None:
        network = trained_network(output / RECOGNIZER, config.train)[0]
        for kind in config.kinds:
            for seed in config.seeds:
                points = points_of(config, generator, output, kind, seed, resume=True)
                faces = neutral_faces(generator, points)
                values = (
                    points,
                    _nearest_cosines(points),
                    _nearest_cosines(pixel_embeddings(faces, faces.double().mean(0))),
                    _nearest_distances(faces),
                    _nearest_cosines(embed(network, faces)),
                )
                for each, value in zip(by_kind, values, strict=True):
                    each[kind].append(value)
    took = run_times(output, found)
    return Results(config, generator, held, found, pixels, *by_kind, took=took)


def _open_cells(config: HyperfaceConfig, output: Path, resume: bool) -> tuple[list[Cell], Faces]:
    """Return the cells and the people to verify on, in a worker."""
    generator, held = open_faces(config.data, config.train, 2)
    return cells(config, generator, output, resume), held
