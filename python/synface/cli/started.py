"""Read how a run was started from its config.json, and the images that a command names."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.textfiles import read_json
from ..data import open_images
from ..training.config import TrainConfig
from .terminal import Bar

if TYPE_CHECKING:  # they import torch, which takes longer than all else that --help needs
    from ..data import Faces, ImageSet
    from ..data.loading.loader import Domain

EMBEDDED = "default"  # as a folder: the embedded faces
PLACES = ("data", "synthetic", "real")  # options that say where images are
# What config.json holds of how a run was started, and what one means that was written earlier.
TEXT: tuple[type, ...] = (str, type(None))
COMMAND: dict[str, tuple[type, ...]] = {
    "data": TEXT,
    "synthetic": TEXT,
    "real": TEXT,
    "mix_ratio": (str,),
    "per_sample": (bool,),
    "holdout": (int,),
    "size": TEXT,
    "relabel": (bool,),
    "memory": (int,),
    "init": TEXT,
}
EARLIER = {
    "init": None,
    "synthetic": None,
    "real": None,
    "mix_ratio": "grid",
    "per_sample": False,
    "relabel": False,
    "memory": 3 << 13,  # all that was trained on, were it grayscale
}
MEMORY = 1024  # MiB
FOLDER_SIZE = (56, 48)  # height, width: what two cores train in a minute or two
EMBEDDED_SIZE = (48, 48)  # of the embedded faces, unless --size says otherwise


def read_faces(
    data: Path | ImageSet | None,
    size: tuple[int, int] | None,
    grayscale: bool | None = None,
    relabel: bool = False,
    memory: int = 8 << 10,  # MiB
) -> Faces:
    """Return the faces of a folder or a set, or the embedded ones, decoded; memory is in MiB."""
    from ..data import ImageSet, embedded_faces, read_folder

    if data is None:
        if size is not None and size[0] != size[1]:
            raise ValueError(f"the embedded faces are square, got --size {size[0]}x{size[1]}")
        return embedded_faces(size=(size or EMBEDDED_SIZE)[0])
    with Bar(f"reading {data.source if isinstance(data, ImageSet) else data}") as bar:
        images = data if isinstance(data, ImageSet) else open_images(data, relabel)
        size = size or FOLDER_SIZE
        return read_folder(images, size, grayscale, memory_limit=memory << 20, progress=bar.files)


def split_faces(
    data: Path | None,
    size: tuple[int, int] | None,
    grayscale: bool | None,
    relabel: bool,
    holdout: int,
    memory: int,
) -> tuple[Domain, Faces]:
    """Return the faces to train on, and the last ones, held out.

    The former are in memory too if all, as RGB, take at most so many MiB.
    """
    from ..data import read_folder
    from ..data.loading.loader import common_shape, opened

    images = open_images(data, relabel) if data else None
    size = size or (FOLDER_SIZE if images else None)
    if images is None or size is None or 3 * math.prod(size) * len(images) <= memory << 20:
        return read_faces(images, size, grayscale, memory=max(memory, 1)).split(holdout)
    height, width, channels = common_shape(opened(data=images), size, grayscale)
    rest, held = images.split(holdout)
    with Bar(f"reading {data}") as bar:
        return rest, read_folder(held, (height, width), channels == 1, progress=bar.files)


def absolute(path: Path | str | None) -> str | None:
    """Return a path as a run's folder keeps it, for the run may be resumed from any directory."""
    return path if path is None or path == EMBEDDED else os.path.abspath(path)


def place(folder: Path, name: str, path: str | None, option: str | None = None) -> str | None:
    """Return the absolute path of a run's images; raise ValueError where nothing is there."""
    path = absolute(path)
    if path not in (None, EMBEDDED) and not Path(path).exists():
        raise ValueError(
            f"{folder}: its images (--{name}) are not at {path} now: say where they are with "
            f"--{option or name}"
        )
    return path


def command_of(file: Path) -> tuple[dict[str, Any], TrainConfig]:
    """Return how a run was started, as `synface train` has it, and its configuration."""
    if not file.is_file():
        raise ValueError(f"{file.parent} holds no run to resume: there is no {file.name}")
    started = read_json(file)
    try:
        config = TrainConfig.from_json(started["config"])
        run = EARLIER | started["command"]
        if run.keys() != COMMAND.keys() or not all(isinstance(run[k], COMMAND[k]) for k in run):
            raise TypeError(f"its command is {run}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    return run, config
