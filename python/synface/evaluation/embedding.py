"""Embeddings of images by a network, or of raw pixels."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..common.check import check_least, check_memory, describe
from ..common.modes import evaluating
from ..data import normalize
from ..data.formats import decode
from ..data.formats.images import Store


@runtime_checkable
class Readable(Protocol):
    """Images that are decoded by index; every `Store` is one.

    Attributes:
        streams: whether only sequential reads are fast.
    """

    streams: bool

    def __len__(self) -> int: ...

    def name(self, row: int) -> str: ...

    def decode_into(
        self, pixels: NDArray[np.uint8], row: int, expected: tuple[int, int] | None = None
    ) -> None: ...


def embed(
    model: nn.Module,
    images: Tensor,
    batch_size: int = 256,
    flip: bool = True,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the embeddings of images by a model in evaluation mode.

    Args:
        model: maps (B, C, H, W) float32 in [-1, 1] to floating embeddings (B, D), or to a tuple
            that begins with them, such as AdaFace's (embedding, norm).
        images: (N, H, W, C) uint8, N at least 1, on any device.
        batch_size: images per call of the model, on the device of its first parameter.
        flip: add the embedding of the horizontally flipped image before normalizing.
        device: of the result.

    Returns:
        (N, D) float32 unit rows.

    Raises:
        TypeError: if the model returns something else.
        ValueError: for images of another dtype or shape, no images, a batch size under 1, and
            embeddings that are not finite, naming the images by their index.
    """
    rows = _embed(model, images, batch_size, flip, lambda index: f"image {index}")
    return rows.to(device)


@torch.no_grad()
def _embed(
    model: nn.Module,
    images: Tensor,
    batch_size: int,
    flip: bool,
    name: Callable[[int], str],
) -> Tensor:
    """Embed images as `embed` does; errors call image i name(i)."""
    check_least("batch_size", batch_size, 1)
    _check_images(images)
    parameter = next(model.parameters(), None)
    device = images.device if parameter is None else parameter.device
    rows = []
    with evaluating(model):
        for batch in images.split(batch_size):
            rows.append(unit_rows(model, normalize(batch.to(device)), flip))
    embeddings = torch.cat(rows).cpu()  # waits for a GPU once
    bad = (~embeddings.isfinite()).any(1).nonzero()[:, 0].tolist()
    if bad:
        shown = ", ".join(name(i) for i in bad[: decode.NAMED])
        shown += ", …" if len(bad) > decode.NAMED else ""
        raise ValueError(
            f"the network's embeddings of {len(bad)} of {len(embeddings)} images are not finite "
            f"(NaN or infinite): {shown}; check the network's weights and precision"
        )
    return embeddings


def unit_rows(model: nn.Module, x: Tensor, flip: bool) -> Tensor:
    """Return a model's embeddings of one batch as unit rows, in the model's mode, differentiably.

    Args:
        model, flip: as for `embed`.
        x: (B, C, H, W) float32 in [-1, 1], on the model's device.

    Returns:
        (B, D) float32, on the device of ``x``.

    Raises:
        TypeError, ValueError: if the model returns something else.
    """
    y = _output(model(x), x.shape[0])
    if flip:
        y = y + _output(model(x.flip(-1)), x.shape[0])
    # In float64, where no square of a float32 overflows.
    return F.normalize(doubled(y)).float().to(x.device)


def doubled(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on its device if that is a GPU, else on the CPU."""
    return (tensor if tensor.device.type == "cuda" else tensor.cpu()).double()


def _output(found: object, count: int) -> Tensor:
    """Return the float32 embeddings in a network's output for `count` images."""
    parts = found if isinstance(found, (tuple, list)) else [found]
    rows = parts[0] if parts else None
    if not isinstance(rows, Tensor) or not rows.is_floating_point():
        came = ", ".join(describe(x) if isinstance(x, Tensor) else type(x).__name__ for x in parts)
        raise TypeError(
            "the network must return floating point embeddings (B, D), or a tuple that begins with "
            f"them, got {type(found).__name__}: {came or 'empty'}"
        )
    if rows.ndim != 2 or rows.shape[0] != count or not rows.shape[1]:
        raise ValueError(
            f"the network must return embeddings of shape ({count}, D) for {count} images, "
            f"got {tuple(rows.shape)}"
        )
    return rows.float()


def embed_store(
    model: nn.Module,
    store: Readable,
    image_shape: tuple[int, int, int],
    *,
    batch_size: int = 256,
    flip: bool = True,
    resize: bool = False,
    bad: dict[int, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Return the embeddings of encoded images, which threads decode batch by batch.

    Args:
        model, batch_size, flip: as `embed`.
        image_shape: (H, W, C) that the model takes.
        resize: resize images of another size; False: they are an error.
        bad: leave out images that cannot be used, and enter what is wrong with them here, by their
            index; None: they are an error.
        progress: called as progress(done, total), first with 0, then after each batch.

    Returns:
        (N, D) float32 unit rows, on the CPU, without those of bad images.

    Raises:
        DataError: for images that cannot be decoded or are of another size; the first five of a
            batch are named. With ``bad``, only if no image can be used.
        TypeError, ValueError: as `embed`; images are named by the store.

    Memory: the result, and three batches of decoded images.
    """
    count, rows = len(store), []
    if progress is not None:
        progress(0, count)
    for end, good, images in _decoded(store, image_shape, batch_size, resize, bad):
        if good:
            named = [store.name(i) for i in good]
            rows.append(_embed(model, images, batch_size, flip, named.__getitem__))
        if progress is not None:
            progress(end, count)
    if not rows and bad:
        wrong = {store.name(i): text for i, text in bad.items()}
        decode.raise_if(wrong, f"of {count} images", "a readable, complete one")
    return torch.cat(rows)


def embed_pixels(
    store: Store,
    image_shape: tuple[int, int, int],
    *,
    batch_size: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Return encoded images as `pixel_embeddings` does, each centered by its own mean.

    Args:
        image_shape: (H, W, C) that images are converted and resized to.
        batch_size, progress: as `embed_store`.

    Returns:
        (N, H*W*C) float32 unit rows. An image of one color has equal coordinates, so its cosine is
        1 to others of one color, and 0 to all else.

    Raises:
        DataError: as `embed_store`.
        ValueError: if the result does not fit into the available memory.

    Memory: the result, and three batches of decoded images.
    """
    count, size = len(store), math.prod(image_shape)
    shape = "x".join(map(str, image_shape))
    check_memory(f"the pixels of {count:,} images of {shape}", 4 * count * size)
    rows = torch.empty(count, size, dtype=torch.float32, device="cpu")
    if progress is not None:
        progress(0, count)
    for end, _, images in _decoded(store, image_shape, batch_size, True):
        part = rows[end - len(images) : end]
        part.copy_(pixel_embeddings(images))
        part[(part == 0).all(1)] = size**-0.5
        if progress is not None:
            progress(end, count)
    return rows


def _decoded(
    store: Readable,
    image_shape: tuple[int, int, int],
    batch_size: int,
    resize: bool,
    bad: dict[int, str] | None = None,
) -> Iterator[tuple[int, list[int], Tensor]]:
    """Yield each batch's end, indices and images (B, H, W, C); threads decode the next one.

    Bad images are entered in ``bad`` and left out; if it is None they are an error.
    """
    check_least("batch_size", batch_size, 1)
    count, expected = len(store), None if resize else image_shape[:2]
    threads = 1 if store.streams else min(4, os.cpu_count() or 1)
    height, width, _ = image_shape
    wanted = f"images of {height}x{width} pixels (height x width)"
    if resize:
        wanted = "readable, complete images"

    def read(pixels: np.ndarray, index: int) -> None:
        store.decode_into(pixels, index, expected)

    with ThreadPoolExecutor(threads) as pool, ThreadPoolExecutor(1) as ahead:

        def batch(begin: int) -> tuple[list[int], Tensor]:
            indices = range(begin, min(begin + batch_size, count))
            images = np.empty((len(indices), *image_shape), np.uint8)
            done = list(pool.map(decode.attempt(read), images, indices))
            wrong = {i: text for i, (_, text) in zip(indices, done, strict=True) if text}
            if bad is None:
                named = {store.name(i): text for i, text in wrong.items()}
                decode.raise_if(named, f"of {len(indices)} images", wanted)
            elif wrong:
                bad.update(wrong)
                images = np.delete(images, [i - begin for i in wrong], axis=0)
            return [i for i in indices if i not in wrong], torch.from_numpy(images)

        following = ahead.submit(batch, 0)
        for begin in range(0, count, batch_size):
            good, images = following.result()
            if begin + batch_size < count:
                following = ahead.submit(batch, begin + batch_size)
            yield min(begin + batch_size, count), good, images


def pixel_embeddings(images: Tensor, mean: Tensor | None = None) -> Tensor:
    """Return centered pixels as unit vectors, a baseline without learning.

    Args:
        images: (N, H, W, C) uint8, N at least 1.
        mean: (H, W, C), in the same 0-255 units, subtracted from every image; None subtracts from
            each image its own mean value, so that the cosine is the pixels' correlation.

    Returns:
        (N, H*W*C) float32 unit rows (zero for an image that equals its mean).

    Raises:
        ValueError: for images of another dtype or shape, no images, or a mean of another shape or
            not finite.
    """
    _check_images(images)
    pixels = images.double().flatten(1)
    if mean is None:
        return F.normalize(pixels - pixels.mean(1, keepdim=True)).float()
    if mean.shape != images.shape[1:]:
        raise ValueError(
            f"mean must have the images' shape {tuple(images.shape[1:])}, got {tuple(mean.shape)}"
        )
    if not mean.isfinite().all():
        raise ValueError("mean must be finite, got NaN or infinite values")
    return F.normalize(pixels - mean.double().flatten()).float()


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0:
        raise ValueError(
            f"images must be uint8 of shape (N, H, W, C) with N at least 1, got {describe(images)}"
        )
