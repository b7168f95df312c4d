"""Images per second of `synface train` and of plain torch, on a CPU or a GPU, and where time goes.

The loops run first, then the loaders alone, and the heads alone for several numbers of classes.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn

from synface_kernels import _env

from ..common.check import check_device
from ..common.rng import generator, normals
from ..data import open_images, read_folder
from ..data.formats.image_set import ImageSet, LabeledImages
from ..training.backbone import check_network
from ..training.config import BUILT_IN
from ..training.model import build_model
from .loaders import loading, whole_batches, write_faces
from .loops import (
    WARM_UP,
    Race,
    SpeedConfig,
    TimedSource,
    failure,
    race,
    ratios,
    sgd,
    steps_of_turn,
)
from .measure import arcface
from .meter import Meter

FILES = 600  # written where no folder is given
HEADS = ("synface", "fused update", "torch")
Result = dict[str, Any]


def head_step(
    name: str, config: SpeedConfig, images: LabeledImages, classes: int, dtype: torch.dtype
) -> Callable[[], None]:
    """Return a step of a head alone, from a batch's embeddings to the centers' update.

    Args:
        name: one of `HEADS`.
        dtype: of the embeddings.
    """
    draw = generator(0, "embeddings", 0, config.on)
    embeddings = normals((config.batch_size, config.embedding_size), draw).to(dtype)
    target = torch.randint(classes, (config.batch_size,), generator=draw, device=config.on)
    # A backbone that takes little memory, since only the head is used.
    training = replace(config.training(), backbone="iresnet", widths=(1,), depths=(1,))
    if name == "torch":
        weight = nn.Parameter(normals((classes, config.embedding_size), draw).mul_(0.01))
        plain = sgd(training, [weight])

        def theirs() -> None:
            plain.zero_grad()
            with config.autocast():
                loss = arcface(embeddings.clone().requires_grad_(), weight, target)
            loss.backward()
            plain.step()

        return theirs
    training = replace(training, fused_update=name == "fused update")
    model = build_model(training, TimedSource(images, config, classes), True, config.on)
    optimizer = model.optimizers["centers"]

    def ours() -> None:
        optimizer.zero_grad()
        inputs = embeddings.clone().requires_grad_()
        with config.autocast():
            loss, _ = model.head(inputs, target, reduction="sum", return_stats=True)
        (loss / len(target)).backward()
        optimizer.step()

    return ours


def _seconds(step: Callable[[], None], steps: int, meter: Meter) -> float:
    """Return the mean seconds of a number of steps."""
    meter.wait()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    meter.wait()
    return (time.perf_counter() - began) / steps


def _heads(
    config: SpeedConfig,
    images: LabeledImages,
    classes: int,
    dtype: torch.dtype,
    more: Callable[[], bool],
) -> Result:
    """Return the seconds of each head's step for a number of classes, interleaved.

    A head that fails, as for too little memory on a GPU, has the reason instead.

    Args:
        dtype: of the embeddings.
        more: whether there is time for another round.
    """
    meter = Meter(config.on)
    steps: dict[str, tuple[Callable[[], None], int]] = {}
    times: dict[str, list[float]] = {name: [] for name in HEADS}
    failed: dict[str, str] = {}

    def warm_up(name: str) -> None:
        step = head_step(name, config, images, classes, dtype)
        for _ in range(WARM_UP[config.on.type]):
            seconds = _seconds(step, 1, meter)
        steps[name] = step, steps_of_turn(10 * seconds)

    def turn(name: str) -> None:
        times[name].append(_seconds(*steps[name], meter))

    for number, run in enumerate([warm_up, *config.rounds * [turn]]):
        if number > 1 and not more():
            break
        for name in list(times):
            try:
                run(name)
            except Exception as error:
                failed[name] = failure(error)
                del times[name]
                steps.pop(name, None)
    seconds = {name: statistics.median(each) for name, each in times.items()}
    return {"classes": classes, "times": times, "seconds": seconds | failed}


def _limit(seconds: float) -> Callable[[], bool]:
    """Return a function that says whether there is time left, from now on."""
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() < end


def measure(
    config: SpeedConfig,
    data: Path | None = None,
    done: Callable[[int], None] = lambda count: None,
    save: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Return the measurements, ready for JSON.

    A part that fails has a text that says why in their place, and the others are measured.

    Args:
        data: images in any format of `open_images`; None: JPEG files of the embedded faces.
        done: called with the number of turns and of heads that are measured.
        save: called with what there is after each part, and each round of the loops.

    Raises:
        DataError: for images that cannot be listed.
        ValueError: for fewer images than a batch has, more identities than ``config`` says, a
            backbone that cannot be built, or a device that torch does not have.
    """
    turns, load = count(1), os.getloadavg()[0]
    device, training = check_device(config.device), config.training()
    check_network(training, (*config.size, 3))

    def turned() -> None:
        done(next(turns))

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if data is None:
            files = -(-FILES // config.batch_size) * config.batch_size
            found = write_faces(folder / "faces", config.size, files)
        else:
            found = open_images(data)
        images = whole_batches(found, config.batch_size)
        if len(images.identities) > config.identities:
            raise ValueError(
                f"identities must be at least the {len(images.identities):,} of {images.source}, "
                f"got {config.identities:,}"
            )
        height, width = config.size
        resident = 3 * height * width * len(images) <= config.memory << 20
        faces = read_folder(images, config.size, False) if resident else images
        about = _env.describe(device)
        result: Result = {
            "machine": _machine(about),
            "environment": about,
            "load": load,
            "config": asdict(config),
            "built_in": training.backbone in BUILT_IN,
            "images": f"{len(images)} JPEG files of the embedded faces"
            if data is None
            else f"{len(images)} of {images.source}",
            "resident": resident,
        }
        in_time = _limit(0.6 * config.seconds)

        def more(so_far: Race) -> bool:
            save(result | so_far.result())
            return in_time()

        raced = race(config, faces, folder / "run", more, turned)
        result |= raced.result()
        save(result)
        result |= _loaders(config, images, _limit(0.1 * config.seconds))
        save(result)
        result["heads"], in_time = [], _limit(0.15 * config.seconds)
        for classes in config.classes:
            row = _heads(config, images, classes, raced.dtype, in_time)
            result["heads"].append(row | {"share": _shares(row, result["seconds"])})
            save(result)
            turned()
    return result


def _machine(about: Result) -> str:
    device = f"{about['device']}, CUDA {about['cuda']}, " if "device" in about else ""
    return (
        f"{device}{about['processor']}, threads: {about['threads']}, torch {about['torch']}, "
        f"Python {about['python']}"
    )


def _loaders(config: SpeedConfig, images: ImageSet, more: Callable[[], bool]) -> Result:
    """Return the images/s of each loader, and our ratio to the others'."""
    try:
        found = loading(
            images, config.size, config.batch_size, config.workers, more, device=config.on
        )
    except Exception as error:
        return {"loaders": failure(error), "loader_ratios": {}}
    return {
        "loaders": found,
        "loader_ratios": {
            name: ratios(found["synface"], found[name]) for name in ("torch", "decoding")
        },
    }


def _shares(row: Result, seconds: Result) -> dict[str, float]:
    """Return each head's share of a step whose other parts take as long as in `train`."""
    if "synface" not in seconds:
        return {}
    apart = sum(seconds["synface"].values()) - seconds["synface"]["head"]
    return {name: row["seconds"][name] / (row["seconds"][name] + apart) for name in row["times"]}
