"""The start of a run, as its config.json records it, and the images that a command names."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from ..common.textfiles import read_json
from ..training.config import NOT_NEGATIVE, TrainConfig, check_fields, option
from .options import RELABEL, parse_size
from .terminal import Bar

if TYPE_CHECKING:  # they import torch, which takes longer than all else that --help needs
    from ..data import Faces, ImageSet
    from ..data.formats.image_set import LabeledImages

EMBEDDED = "default"  # as a folder: the embedded faces
IMAGES = ("data", "synthetic", "real")  # options that say where images are
# Options added later, with the values that older runs had.
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


@dataclass(frozen=True)
class Started:
    """The options of `synface train` that say which images a run has, and which run it began with.

    Paths are absolute: a run may be resumed from any directory.
    """

    data: str | None = option(
        None,
        "Image folder, one sub-folder per identity; or RecordIO, WebDataset shards, Parquet, a "
        "folder of Hugging Face datasets. Default: the 100 real faces that scikit-image ships, "
        "with style variation.",
        type=Path | None,
    )
    synthetic: str | None = option(
        None,
        f"Image folder to mix with --real and train on; {EMBEDDED!r} stands for the embedded "
        "faces.",
    )
    real: str | None = option(
        None, "Image folder of the real images; see --synthetic.", type=Path | None
    )
    mix_ratio: str = option(
        "grid",
        "Distribution of the synthetic share: grid (0, 0.05, … 1), beta:A or constant:V.",
    )
    per_sample: bool = option(False, "Draw a share for each image instead of each batch.")
    holdout: int = option(10, "Identities (the last ones) held out for verification.", NOT_NEGATIVE)
    size: str | None = option(
        None,
        "Height×width in pixels, such as 112x112. Default: 56x48 for a folder, 48x48 for the "
        "embedded faces.",
    )
    relabel: bool = option(False, RELABEL)
    memory: int = option(
        MEMORY,
        "MiB that the images of --data may take, decoded to RGB, to be held in memory; those of a "
        "larger set are decoded while it trains.",
        NOT_NEGATIVE,
    )
    init: str | None = option(
        None,
        "Run whose backbone the new one begins with, and whose class centers too where the "
        "identities are as many.",
        type=Path | None,
    )

    def __post_init__(self) -> None:
        check_fields(self)
        for name in (*IMAGES, "init"):
            path = getattr(self, name)
            if path not in (None, EMBEDDED):
                object.__setattr__(self, name, os.path.abspath(path))

    @staticmethod
    def from_json(values: dict[str, Any]) -> Started:
        """Return what a config.json records; raise TypeError or ValueError for other values."""
        values, hints = EARLIER | values, get_type_hints(Started)
        if values.keys() != hints.keys() or not all(
            isinstance(values[name], hint) for name, hint in hints.items()
        ):
            raise TypeError(f"its command is {values}")
        return Started(**values)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images that it trains on."""
        embedded = self.synthetic == EMBEDDED or not (self.data or self.real)
        return parse_size(self.size) or (EMBEDDED_SIZE if embedded else FOLDER_SIZE)


def read_faces(
    data: Path | ImageSet | None,
    size: tuple[int, int] | None,
    grayscale: bool | None = None,
    relabel: bool = False,
    memory: int = 8 << 10,  # MiB
) -> Faces:
    """Return the faces of a folder or a set, or the embedded ones, decoded; memory is in MiB."""
    from ..data import ImageSet, embedded_faces, open_images, read_folder

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
) -> tuple[LabeledImages, Faces]:
    """Return the faces to train on, and the last ones, held out.

    The former are in memory too if all, as RGB, take at most ``memory`` MiB.
    """
    from ..data import open_images, read_folder
    from ..data.loading.loader import common_shape, opened

    images = open_images(data, relabel) if data else None
    size = size or (FOLDER_SIZE if images else None)
    if images is None or size is None or 3 * math.prod(size) * len(images) <= memory << 20:
        return read_faces(images, size, grayscale, memory=max(memory, 1)).split(holdout)
    height, width, channels = common_shape(opened(data=images), size, grayscale)
    rest, held = images.split(holdout)
    with Bar(f"reading {data}") as bar:
        return rest, read_folder(held, (height, width), channels == 1, progress=bar.files)


def located(folder: Path, name: str, path: str | None, option: str | None = None) -> str | None:
    """Return the path of a run's images; raise ValueError where there are none."""
    if path not in (None, EMBEDDED) and not Path(path).exists():
        raise ValueError(
            f"{folder}: its images (--{name}) are not at {path} now: say where they are with "
            f"--{option or name}"
        )
    return path


def command_of(file: Path) -> tuple[Started, TrainConfig]:
    """Return how a run was started, and its configuration."""
    if not file.is_file():
        raise ValueError(f"{file.parent} holds no run to resume: there is no {file.name}")
    started = read_json(file)
    try:
        return Started.from_json(started["command"]), TrainConfig.from_json(started["config"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
