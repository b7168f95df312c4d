"""Loaders of images: ours, torch's `DataLoader` with Pillow, and decoding alone."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..common.check import cores
from ..common.extras import extra
from ..data import ImageLoader, embedded_faces, normalize, open_images
from ..data.formats.image_set import Faces, ImageSet, LabeledImages
from ..data.mixing.ratios import send
from .meter import Meter

CPU = torch.device("cpu")
QUALITY = 95  # of the JPEG files that are written


def _pillow() -> ModuleType:
    with extra("train", "timing loaders of images"):
        from PIL import Image
    return Image


def write_faces(folder: Path, size: tuple[int, int], count: int) -> ImageSet:
    """Write JPEG files of the embedded faces, one sub-folder per person, and list them.

    Args:
        size: (H, W) of the files, in RGB.
        count: number of files.
    """
    pillow, faces = _pillow(), embedded_faces(-(-count // 100))
    for i in range(count):
        of_person = folder / f"p{int(faces.labels[i])}"
        of_person.mkdir(parents=True, exist_ok=True)
        face = pillow.fromarray(faces.images[i, ..., 0].numpy())
        face = face.resize(size[::-1], pillow.Resampling.BICUBIC).convert("RGB")
        face.save(of_person / f"{i}.jpg", quality=QUALITY)
    return open_images(folder)


def whole_batches(images: LabeledImages, batch_size: int) -> ImageSet:
    """Return as many of the images, spread over the set, as fill batches.

    Raises:
        ValueError: for fewer images than a batch has.
    """
    count = len(images) // batch_size * batch_size
    if not count:
        raise ValueError(f"{images.source} must hold a batch of {batch_size}, got {len(images)}")
    rows = np.arange(count) * len(images) // count
    labels = np.asarray(images.labels)[rows]
    return ImageSet(images.store.take(rows), labels, images.identities, images.source)


class PillowDataset(Dataset[tuple[Tensor, int]]):
    """Images decoded by Pillow and normalized one by one, as torchvision's transforms do it."""

    def __init__(self, images: ImageSet, size: tuple[int, int]) -> None:
        self.images, self.size = images, size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pillow = _pillow()
        with self.images.store.open(index) as file:
            image = pillow.open(file).convert("RGB")
        if (image.height, image.width) != self.size:
            image = image.resize(self.size[::-1], pillow.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.float().div(255).sub_(0.5).div_(0.5), int(self.images.labels[index])


class _Endless(Sampler[int]):
    """The indices of a set, shuffled again in each of its passes, without end."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(self.count, device="cpu").tolist()


def plain_batches(
    images: LabeledImages,
    size: tuple[int, int],
    batch_size: int,
    workers: int,
    device: torch.device = CPU,
) -> Iterator[Any]:
    """Return an endless iterator over batches of normalized images and labels, in plain torch.

    Files are decoded by a `DataLoader`, whose workers are started, and in page-locked memory for a
    GPU. Images in memory are normalized on the device.
    """
    if isinstance(images, Faces):
        return _in_memory(images, batch_size, device)
    assert isinstance(images, ImageSet)
    return iter(
        DataLoader(
            PillowDataset(images, size), batch_size, sampler=_Endless(len(images)),
            num_workers=workers, pin_memory=device.type == "cuda", timeout=60,
        )
    )  # fmt: skip


def _in_memory(faces: Faces, batch_size: int, device: torch.device) -> Iterator[Any]:
    on_gpu = device.type == "cuda"
    while True:
        for rows in torch.randperm(len(faces), device="cpu").split(batch_size):
            images, labels = faces.images[rows], faces.labels[rows]
            if on_gpu:
                images, labels = images.pin_memory(), labels.pin_memory()
            images = images.to(device, non_blocking=on_gpu).permute(0, 3, 1, 2).contiguous()
            yield images.float().div_(127.5).sub_(1), labels


def _decoding(images: ImageSet, count: int, workers: int, rounds: int) -> list[float]:
    """Return the images/s of Pillow's decoder, which is C, alone, one number per round.

    It is timed on one thread, and multiplied by the workers that have a core each.
    """
    pillow, contents = _pillow(), [images.read(i) for i in range(min(count, len(images)))]
    found = []
    for _ in range(rounds):
        opened = [pillow.open(io.BytesIO(content)) for content in contents]
        began = time.perf_counter()
        for image in opened:
            image.load()
        seconds = time.perf_counter() - began
        found.append(min(workers, cores()) * len(opened) / seconds)
    return found


def loading(
    images: ImageSet,
    size: tuple[int, int],
    batch_size: int,
    workers: int,
    more: Callable[[], bool],
    count: int = 512,
    device: torch.device = CPU,
) -> dict[str, list[float]]:
    """Return the images/s of each loader, one number per round, interleaved.

    Batches are copied to the device. A turn begins with those that are queued, so that none was
    made in another's turn, and ends once the queue should be full again. Decoding is timed after
    the loaders' processes ended.

    Args:
        images: the files. size: (H, W) to which they are resized.
        more: called before each round but the first: whether to go on.
        count: images in a turn, at least; and as many batches as are queued.
    """
    found = _interleaved(images, size, batch_size, workers, more, count, device)
    return found | {"decoding": _decoding(images, count, workers, len(found["synface"]))}


def _interleaved(
    images: ImageSet,
    size: tuple[int, int],
    batch_size: int,
    workers: int,
    more: Callable[[], bool],
    count: int,
    device: torch.device,
) -> dict[str, list[float]]:
    """Return the images/s of both loaders, whose processes have ended then; as `loading`."""
    meter, queued = Meter(device), 2 * workers + 1
    batches = max(-(-count // batch_size), queued)

    def turn(advance: Callable[[], Any]) -> float:
        for _ in range(queued):
            advance()
        meter.wait()
        began = time.perf_counter()
        for _ in range(batches):
            advance()
        meter.wait()
        seconds = time.perf_counter() - began
        time.sleep(seconds * queued / batches)
        return batches * batch_size / seconds

    theirs = plain_batches(images, size, batch_size, workers, device)
    pin = device.type == "cuda"
    with ImageLoader(
        images, batch_size, size=size, grayscale=False, workers=workers, pin=pin
    ) as ours:

        def advance() -> None:  # as `FacesSource` does
            sent = send(next(ours)[1].images, device)
            ours.sent(device)
            normalize(sent)

        runs: dict[str, Callable[[], float]] = {
            "synface": lambda: turn(advance),
            "torch": lambda: turn(lambda: send(next(theirs)[0], device)),
        }
        found: dict[str, list[float]] = {name: [] for name in runs}
        while not found["synface"] or more():
            for name, run in runs.items():
                found[name].append(run())
    return found
