"""The options that a run was started with, as config.json records them, and its images."""

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

if TYPE_CHECKING:  # they import torch, which --help must not wait for
    from ..data import Faces, ImageSet
    from ..data.formats.image_set import LabeledImages

EMBEDDED = "default"  # folder name that stands for the embedded faces
IMAGES = ("data", "synthetic", "real")  # options that say where images are
MOVABLE = (*IMAGES, "transforms")  # a resumed run may have new paths of these
# Options that a resumed run may change.
FREE = ("verify_every", "best", "patience", "loggers")
# Options added later, with the values that older runs had.
EARLIER = {
    "init": None,
    "init_head": "auto",
    "transforms": None,
    "synthetic": None,
    "real": None,
    "mix_ratio": "grid",
    "per_sample": False,
    "relabel": False,
    "memory": 3 << 13,  # RGB equivalent of the earlier limit, 8 GiB in grayscale
    "verify_every": 0.0,
    "best": None,
    "patience": 0,
    "loggers": "",
}
MEMORY = 1024  # MiB
FOLDER_SIZE = (56, 48)  # height, width: small enough to train on two cores in a minute or two
EMBEDDED_SIZE = (48, 48)  # of the embedded faces, unless --size says otherwise


@dataclass(frozen=True)
class Started:
    """The options of `synface train` for a run's images, initial parameters and verification.

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
    holdout: int = option(10, "Identities, the last ones, held out for verification.", NOT_NEGATIVE)
    size: str | None = option(
        None,
        "Height×width in pixels, such as 112x112. Default: 56x48 for a folder, 48x48 for the "
        "embedded faces.",
    )
    relabel: bool = option(False, RELABEL)
    memory: int = option(
        MEMORY,
        "MiB of memory for the images of --data, decoded to RGB; the images of a larger set are "
        "decoded during training.",
        NOT_NEGATIVE,
    )
    init: str | None = option(
        None,
        "Run to load the initial backbone from, or a file of its weights: safetensors, or a torch "
        "file such as insightface's backbone.pth.",
        type=Path | None,
    )
    init_head: str = option(
        "auto",
        "Class centers of the --init run: keep, resize (keep the first ones), new, or auto, which "
        "keeps them if it has the same number of identities.",
    )
    verify_every: float = option(
        0.0, "Epochs between verifications; 0 for only one at the end.", NOT_NEGATIVE
    )
    best: str | None = option(
        None,
        "Measure whose best verification keeps its checkpoint in the run's folder best: auc, "
        "accuracy or tar_at_far_0.1, 0.01, 0.001.",
    )
    patience: int = option(
        0,
        "Verifications without a better --best after which the run ends early; 0 for never.",
        NOT_NEGATIVE,
    )
    loggers: str = option(
        "",
        "Further logs of the metrics, separated by commas: tensorboard, wandb, mlflow.",
    )
    transforms: str | None = option(
        None,
        "TOML file of torchvision or albumentations transforms of the training images, which "
        "precede --augment.",
        type=Path | None,
    )

    def __post_init__(self) -> None:
        check_fields(self)
        for name in (*MOVABLE, "init"):
            path = getattr(self, name)
            if path not in (None, EMBEDDED):
                object.__setattr__(self, name, os.path.abspath(path))

    @staticmethod
    def from_json(values: dict[str, Any]) -> Started:
        """Return the options in a config.json; raise TypeError or ValueError for other values."""
        values, hints = EARLIER | values, get_type_hints(Started)
        if values.keys() != hints.keys() or not all(
            isinstance(values[name], hint) for name, hint in hints.items()
        ):
            raise TypeError(f"its command is {values}")
        return Started(**values)

    @property
    def logger_names(self) -> tuple[str, ...]:
        """The names in ``loggers``."""
        return tuple(name.strip() for name in self.loggers.split(",") if name.strip())

    @property
    def image_size(self) -> tuple[int, int]:
        """The (H, W) of the training images."""
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

    The former are in memory too if all images, as RGB, need at most ``memory`` MiB.
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
    """Return the path of a run's images or transforms; raise ValueError if it does not exist."""
    if path not in (None, EMBEDDED) and not Path(path).exists():
        what = "images" if name in IMAGES else name
        raise ValueError(
            f"{folder}: its {what} (--{name}) are no longer at {path}: give their path with "
            f"--{option or name}"
        )
    return path


def command_of(file: Path) -> tuple[Started, TrainConfig]:
    """Return the options that a run was started with, and its configuration."""
    if not file.is_file():
        raise ValueError(f"{file.parent} holds no run to resume: there is no {file.name}")
    started = read_json(file)
    try:
        return Started.from_json(started["command"]), TrainConfig.from_json(started["config"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
