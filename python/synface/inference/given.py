"""Images as users have them: paths, PIL images, arrays and tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..common.extras import extra
from ..data.formats import decode
from ..data.formats.images import open_regular

if TYPE_CHECKING:
    from typing import TypeAlias

    from PIL import Image

    from ..data.formats.image_set import LabeledImages
    from ..evaluation.embedding import Readable

    One: TypeAlias = str | os.PathLike[str] | Image.Image | NDArray[Any] | Tensor
    Images: TypeAlias = One | Iterable[One] | LabeledImages | Readable

NHWC, NCHW = "NHWC", "NCHW"
CHANNELS = (1, 3)


class GivenImages:
    """Images of mixed kinds and sizes, decoded by index.

    Attributes:
        items: paths, PIL images, and (H, W, C) arrays, uint8 or float in [0, 1].
    """

    streams = False

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def name(self, row: int) -> str:
        """Return an image's path, or its index."""
        item = self.items[row]
        return str(item) if isinstance(item, Path) else f"image {row}"

    def decode_into(
        self, pixels: NDArray[np.uint8], row: int, expected: tuple[int, int] | None = None
    ) -> None:
        """Decode an image into an array (H, W, C), converted and resized to fit."""
        item = self.items[row]
        if isinstance(item, Path):
            with open_regular(item) as file:
                decode.read_into(pixels, file, expected)
            return
        image = (
            decode.from_bytes(_bytes(item)) if isinstance(item, np.ndarray) else decode.loaded(item)
        )
        pixels[:] = decode.fit(image, pixels.shape[:2], pixels.shape[2])


def given(images: Any, layout: str | None = None) -> GivenImages:
    """Return images as `FaceNetwork.embed` takes them, checked but not decoded.

    Raises:
        TypeError: for an object that is no image.
        ValueError: for an array of another dtype, shape or range, and a layout of another name.
    """
    check_layout(layout)
    if isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
        return GivenImages(list(_array("images", images, layout)))
    if _is_one(images):
        return GivenImages([_item("images", images, layout)])
    if not isinstance(images, Iterable):
        raise TypeError(f"images must be {EXPECTED}, got {type(images).__name__}")
    return GivenImages([_item(f"images[{i}]", each, layout) for i, each in enumerate(images)])


EXPECTED = "paths, PIL images, arrays, tensors, or a set of images"


def _is_one(value: Any) -> bool:
    with extra("train", decode.READING):
        from PIL import Image

    return isinstance(value, (str, os.PathLike, Image.Image, np.ndarray, Tensor))


def _item(name: str, value: Any, layout: str | None) -> Any:
    """Return one image as `GivenImages` has it."""
    if not _is_one(value):
        raise TypeError(
            f"{name} must be a path, PIL image, array or tensor, got {type(value).__name__}"
        )
    if isinstance(value, (np.ndarray, Tensor)):
        if value.ndim not in (2, 3):
            raise ValueError(
                f"{name} must be one image, (H, W), (H, W, C) or (C, H, W), got {came(value)}"
            )
        return _array(name, value, layout)
    return Path(value) if isinstance(value, (str, os.PathLike)) else value


def _array(name: str, value: Any, layout: str | None) -> NDArray[Any]:
    """Return an image (H, W, C), or several (N, H, W, C), as a NumPy array; check its values."""
    tensor = value.detach().cpu() if isinstance(value, Tensor) else None
    if tensor is not None:
        array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    else:
        array = value
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise ValueError(f"{name} must be uint8 or floating point, got {came(value)}")
    if 0 in array.shape:
        raise ValueError(f"{name} must not be empty, got {came(value)}")
    if array.ndim == 2:
        array = array[..., None]
    elif _channels_are_first(name, value, layout):
        array = np.moveaxis(array, -3, -1)
    if array.dtype.kind == "f":
        check_range(name, float(array.min()), float(array.max()))
    return array


def _channels_are_first(name: str, value: Any, layout: str | None) -> bool:
    first, last = value.shape[-3] in CHANNELS, value.shape[-1] in CHANNELS
    if layout is not None:
        first, last = first and layout == NCHW, last and layout == NHWC
    if not (first or last):
        where = {None: "first or last", NHWC: "last", NCHW: "first"}[layout]
        raise ValueError(
            f"{name} must have 1 or 3 channels on the {where} axis of an image, got {came(value)}"
        )
    if first and last:
        raise ValueError(
            f"{name} of shape {tuple(value.shape)} may have its channels first or last: give "
            f"layout={NHWC!r} or {NCHW!r}"
        )
    return first


def check_layout(layout: str | None) -> None:
    """Raise ValueError unless a layout is one of those known, or None."""
    if layout not in (None, NHWC, NCHW):
        raise ValueError(f"layout must be {NHWC!r} or {NCHW!r}, got {layout!r}")


def check_range(name: str, low: float, high: float) -> None:
    """Raise ValueError unless the least and the largest value of floating images are in [0, 1]."""
    if not (low >= 0 and high <= 1):  # NaN neither
        raise ValueError(
            f"{name} of floating point must lie in [0, 1], got values from {low:g} to {high:g}; "
            "uint8 images lie in [0, 255]"
        )


def came(value: Any) -> str:
    """Return the dtype and shape of an array or tensor, for an error message."""
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def _bytes(image: NDArray[Any]) -> NDArray[np.uint8]:
    """Return an image as contiguous bytes, rounded from [0, 1]."""
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    return np.ascontiguousarray((image.astype(np.float32) * 255.0).round().astype(np.uint8))
