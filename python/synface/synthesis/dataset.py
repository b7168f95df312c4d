"""Image folders of generated faces: one sub-folder per identity, as `synface train` reads them."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import checkpoint
from ..common.check import check_folder, check_least, check_rows, describe
from ..common.files import write_text
from ..common.rng import normals
from ..common.textfiles import read_json
from ..data.formats.decode import png
from .embeddings import sha256_of_rows
from .generators import FaceGenerator

MANIFEST = "synthesis.json"
FORMAT = 1


def synthesize(
    embeddings: Tensor,
    generator: FaceGenerator,
    output: str | Path,
    images_per_identity: int,
    *,
    seed: int = 0,
    batch_size: int = 64,
    workers: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write PNG images of each identity into an image folder.

    Image k of identity i is ``output/00000i/00k.png``; its style and seed depend on (seed, i, k)
    alone. ``output/synthesis.json`` describes the folder. Images are written atomically, so every
    image that exists is whole, however the process ended; ``resume=True`` generates the missing
    ones, bitwise as in an uninterrupted run.

    The generator always gets the same batches, so this holds for a model in a file as well, whose
    rounding may depend on the batch: the folder depends on ``batch_size``, though not on the number
    of workers.

    Args:
        embeddings: (N, D) floating, one identity per row; normalized here.
        generator: the face generator, called in this thread.
        output: the folder; missing or empty, unless resume or overwrite is set.
        images_per_identity: at least 1.
        seed: random seed of the styles, not negative; another one gives other images of the same
            people.
        batch_size: images per call of the generator.
        workers: threads that encode and write; None for one per core.
        resume: go on in a folder that the same arguments began (or that does not exist yet).
        overwrite: remove the identities in a folder that this function wrote, and start again.
        progress: called as progress(done, total) at the start and after each image.

    Returns:
        The number of generated images: N * images_per_identity less those that existed.

    Raises:
        ValueError: for arguments out of range, embeddings that are zero or not finite, a generator
            that does not return its images and, with resume, a folder written with other arguments.
        FileExistsError: for a folder that is not empty.
        OSError: for a folder that cannot be written (a full disk, say); finished images stay.

    Memory: three batches of images, and one byte per image of the folder.
    """
    check_least("images_per_identity", images_per_identity, 1)
    check_least("seed", seed, 0)
    check_least("batch_size", batch_size, 1)
    check_least("workers", 1 if workers is None else workers, 1)
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other")
    embeddings, unit = checked(embeddings, generator.embedding_size)
    root = Path(output)
    _begin(
        root,
        {
            "format": FORMAT,
            "embeddings": {
                "shape": list(embeddings.shape),
                "sha256": sha256_of_rows(embeddings),
            },
            "generator": generator.description,
            "image_shape": list(generator.image_shape),
            "images_per_identity": images_per_identity,
            "batch_size": batch_size,
            "seed": seed,
        },
        resume,
        overwrite,
    )

    missing = _missing(root, len(unit), images_per_identity).reshape(-1)
    total = missing.size
    done = already = total - int(missing.sum())
    if progress is not None:
        progress(done, total)
    pool = ThreadPoolExecutor(workers or os.cpu_count() or 1)
    written: deque[Future[None]] = deque()

    def collect(at_most: int) -> None:
        nonlocal done
        while len(written) > at_most:
            written.popleft().result()
            done += 1
            if progress is not None:
                progress(done, total)

    try:
        for start in range(0, total, batch_size):
            wanted = missing[start : start + batch_size]
            if not wanted.any():
                continue
            identity, image = np.divmod(np.arange(start, start + len(wanted)), images_per_identity)
            style, seeds = styles(seed, identity, image, generator.style_size)
            images = _generate(generator, unit[torch.from_numpy(identity)], style, seeds)
            for i in np.unique(identity[wanted]):
                _file(root, int(i), 0).parent.mkdir(exist_ok=True)
            for k in np.flatnonzero(wanted):
                file = _file(root, int(identity[k]), int(image[k]))
                written.append(pool.submit(_write, file, images[k]))
            collect(at_most=2 * batch_size)
        collect(at_most=0)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror or error}, after {done} of {total} images (these are complete; "
            "--resume generates the others)",
            str(root),
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)  # waits for the images that are being written
    return total - already


def checked(embeddings: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return (N, D) embeddings as float32 on the CPU, contiguous: unchanged, and normalized.

    Raises:
        ValueError: for another dtype or shape, and a row that is zero or not finite.
    """
    if (
        embeddings.ndim != 2
        or not embeddings.is_floating_point()
        or embeddings.shape[1] != size
        or len(embeddings) < 1
    ):
        raise ValueError(
            f"embeddings must be floating point of shape (N, {size}), as the generator takes, "
            f"got {str(embeddings.dtype).removeprefix('torch.')} {tuple(embeddings.shape)}"
        )
    embeddings = embeddings.detach().cpu().float().contiguous()
    return embeddings, (embeddings / check_rows("embeddings", embeddings)).float()


def _begin(root: Path, manifest: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Prepare a folder with this manifest, and without images that it does not describe."""
    manifest = json.loads(json.dumps(manifest))
    file = root / MANIFEST
    check_folder("output", root)
    root.mkdir(parents=True, exist_ok=True)
    stored = _stored(file)
    if stored is None:
        if any(entry.name != MANIFEST + ".part" for entry in root.iterdir()):
            raise FileExistsError(
                f"{root} holds files that were not synthesized: choose another output folder"
            )
    elif resume:
        checkpoint.check_same(root, stored, dict.fromkeys(stored) | manifest)
        return
    elif overwrite:
        for entry in root.iterdir():
            if entry.is_dir() and re.fullmatch("[0-9]+", entry.name):
                shutil.rmtree(entry)
    else:
        raise FileExistsError(
            f"{root} was synthesized before: resume it (--resume) or replace it (--overwrite)"
        )
    write_text(file, json.dumps(manifest, indent=1) + "\n")


def _stored(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    stored = read_json(file)
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise ValueError(f"{file} is damaged: expected format {FORMAT}")
    return stored


def _file(root: Path, identity: int, image: int) -> Path:
    return root / f"{identity:06d}" / f"{image:03d}.png"


def _missing(root: Path, identities: int, images: int) -> np.ndarray:
    """Return (N, S) bool: the images that do not exist yet."""
    missing = np.ones((identities, images), bool)
    names = [_file(root, 0, image).name for image in range(images)]
    for identity in range(identities):
        try:
            present = set(os.listdir(_file(root, identity, 0).parent))
        except FileNotFoundError:
            continue
        missing[identity] = [name not in present for name in names]
    return missing


def styles(
    seed: int, identity: np.ndarray, image: np.ndarray, style_size: int
) -> tuple[Tensor, Tensor]:
    """Return styles (B, S), and seeds (B,) for other random draws, from (seed, identity, image)."""
    styles, seeds = [], []
    for words in zip(identity.tolist(), image.tolist(), strict=True):
        pair = np.random.SeedSequence([seed, *words]).generate_state(2, np.uint64) >> np.uint64(1)
        stream = torch.Generator().manual_seed(int(pair[0]))
        styles.append(normals((style_size,), stream))
        seeds.append(int(pair[1]))
    return torch.stack(styles), torch.tensor(seeds, device="cpu")


def _generate(
    generator: FaceGenerator, embedding: Tensor, style: Tensor, seed: Tensor
) -> np.ndarray:
    """Return a batch of images; raise ValueError unless it is as `FaceGenerator.generate`
    requires.
    """
    images = generator.generate(embedding, style, seed)
    shape = (len(seed), *generator.image_shape)
    if (
        not isinstance(images, Tensor)
        or images.dtype != torch.uint8
        or tuple(images.shape) != shape
        or images.device.type != "cpu"
    ):
        raise ValueError(
            f"generator must return uint8 {shape} on cpu, "
            f"got {describe(images) if isinstance(images, Tensor) else type(images).__name__}"
        )
    return images.numpy()


def _write(file: Path, pixels: np.ndarray) -> None:
    """Write one PNG file atomically."""
    content = png(pixels)
    part = file.with_name(f".{file.name}.part")
    try:
        part.write_bytes(content)
        part.replace(file)
    except OSError:
        part.unlink(missing_ok=True)
        raise
